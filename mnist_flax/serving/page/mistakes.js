// The run's mistakes on the test set, to browse.
import { ask } from "./api.js";
import { element } from "./dom.js";
import { paintDigit } from "./looks.js";

/** `chosen(mistake)` is called with a mistake that was pressed. */
export function makeMistakes(chosen) {
  let state = "new";

  function button(mistake) {
    const made = document.createElement("button");
    const canvas = Object.assign(document.createElement("canvas"), { width: 28, height: 28 });
    paintDigit(canvas, mistake.pixels);
    const share = `${(100 * mistake.confidence).toFixed(0)} %`;
    const line = (text) => Object.assign(document.createElement("span"), { textContent: text });
    made.append(canvas, line(`${mistake.label}, not ${mistake.likeliest}`), line(mistake.digit === null ? `? (${share})` : share));
    made.setAttribute("aria-label", `labelled ${mistake.label}, read as ${mistake.likeliest} with ${share}`);
    made.dataset.label = mistake.label;
    made.addEventListener("click", () => {
      for (const other of element("mistakes").children) other.setAttribute("aria-pressed", other === made);
      chosen(mistake);
    });
    return made;
  }

  function show(found) {
    const examples = found.examples.toLocaleString("en");
    const listed = found.mistakes.length < found.errors ? ` The ${found.mistakes.length} surest are shown.` : "";
    element("mistakes-status").textContent = found.errors
      ? `Read wrong: ${found.errors} of ${examples} test images, the surest first; ${found.doubtful} of these so ` +
        `doubtful as to be answered with “?”.${listed} Press one to look inside.`
      : `None of the ${examples} test images is read wrong.`;
    element("mistakes").replaceChildren(...found.mistakes.map(button));
    const labels = [...new Set(found.mistakes.map((mistake) => mistake.label))].sort();
    element("mistakes-label").append(
      ...labels.map((label) => Object.assign(document.createElement("option"), { value: label, textContent: `labelled ${label}` })),
    );
    element("mistakes-filter").hidden = labels.length < 2;
  }

  element("mistakes-label").addEventListener("change", (event) => {
    for (const made of element("mistakes").children) made.hidden = event.target.value !== "" && made.dataset.label !== event.target.value;
  });

  return {
    /** Fetches them, the first time. */
    async load() {
      if (state !== "new") return;
      state = "loading";
      try {
        show(await ask("api/mistakes"));
        state = "loaded";
      } catch (error) {
        element("mistakes-status").textContent = error.message;
        state = "new";
      }
    },
  };
}
