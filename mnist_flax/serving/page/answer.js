// The answer: the digit, a sentence, and ten bars that are also buttons.
import { element } from "./dom.js";

/** A share as people read it; what is neither 0 nor 1 is not shown as such. */
const percent = (share) =>
  share > 0.9995 ? "over 99.9 %" : share < 0.0005 ? "under 0.1 %" : `${(100 * share).toFixed(1)} %`;
const brief = (share) => (share < 0.001 ? "0" : share > 0.999 ? "100" : (100 * share).toFixed(share < 0.0995 ? 1 : 0));

/** `asked(digit)` is called when a bar is pressed. */
export function makeAnswer(asked) {
  const bars = Array.from({ length: 10 }, (_, digit) => {
    const button = document.createElement("button");
    const [share, track, fill, name] = ["share", "track", "fill", "name"].map((kind) => {
      const part = document.createElement("span");
      part.className = kind;
      return part;
    });
    name.textContent = digit;
    track.append(fill);
    button.append(share, track, name);
    button.addEventListener("click", () => asked(digit));
    element("bars").append(button);
    return { button, share, fill };
  });

  function fill(probabilities) {
    bars.forEach(({ button, share, fill }, digit) => {
      const p = probabilities?.[digit] ?? 0;
      fill.style.height = `${100 * p}%`;
      share.textContent = probabilities ? brief(p) : "";
      button.disabled = !probabilities;
      button.setAttribute("aria-label", probabilities ? `${digit}: ${percent(p)}` : `${digit}`);
    });
  }

  function verdict(text, sentence, unsure) {
    element("digit").textContent = text;
    element("digit").classList.toggle("unsure", unsure);
    element("sentence").textContent = sentence;
  }

  return {
    /** Shows a prediction; screen readers hear of a drawing when the pen is up. */
    show(result, digit) {
      element("sentence").setAttribute("aria-live", digit.finished ? "polite" : "off");
      const sure = result.digit !== null;
      const sentence = sure
        ? `The network reads ${result.digit}, with a probability of ${percent(result.confidence)}.`
        : `Too doubtful for an answer: likeliest is ${result.likeliest}, with only ${percent(result.confidence)}.`;
      const truth = digit.label === undefined ? "" : ` It is example ${digit.index} of the test set, labelled ${digit.label}.`;
      verdict(sure ? result.digit : "?", sentence + truth, !sure);
      fill(result.probabilities);
    },
    clear() {
      verdict("–", "Nothing is drawn yet.", false);
      fill(null);
    },
    press(about) {
      bars.forEach(({ button }, digit) => button.setAttribute("aria-pressed", digit === about));
    },
    describe(threshold) {
      element("bars-caption").textContent =
        `How probable each digit is, in percent; an answer below ${+(100 * threshold).toFixed(2)} % is “?”. ` +
        `Press a digit to ask what speaks for it.`;
    },
  };
}
