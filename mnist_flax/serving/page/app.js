// The page's parts and how a digit goes from one to the next. No part knows another; they meet here.
import { ask } from "./api.js";
import { element } from "./dom.js";
import { makePad } from "./pad.js";
import { makeAnswer } from "./answer.js";
import { makeLooks } from "./looks.js";
import { makePictures } from "./pictures.js";
import { makeMistakes } from "./mistakes.js";

/** Calls `work` with the latest value given, one at a time: what comes while it works replaces what waits. */
function latest(work) {
  let waiting = null;
  let busy = false;
  return async (value) => {
    waiting = { value };
    if (busy) return;
    busy = true;
    while (waiting) {
      const { value: next } = waiting;
      waiting = null;
      await work(next).then(() => showProblem(""), (error) => showProblem(error.message));
    }
    busy = false;
  };
}

function showProblem(sentence) {
  element("problem").textContent = sentence;
  element("problem").hidden = !sentence;
}

let shown = null; // the digit on show: {strokes} or {pixels}, and where it is from
let about = null; // the class that was asked about, or null for the likeliest

const answer = makeAnswer((digit) => {
  about = about === digit ? null : digit;
  answer.press(about);
  if (shown) explain(shown);
});
const looks = makeLooks();

const content = (digit) => (digit.strokes ? { strokes: digit.strokes } : { pixels: digit.pixels });
const predict = latest(async (digit) => {
  if (digit !== shown) return;
  const result = await ask("api/predict", JSON.stringify(content(digit)));
  if (digit === shown) answer.show(result, digit);
});
const explain = latest(async (digit) => {
  if (digit !== shown) return;
  const result = await ask("api/explain", JSON.stringify(about === null ? content(digit) : { ...content(digit), about }));
  if (digit === shown) looks.show(result, digit);
});

/** Puts a digit on show, or nothing. */
function show(digit) {
  if (!digit || digit.kind !== shown?.kind || digit.kind !== "drawing") answer.press((about = null));
  shown = digit;
  if (!digit) {
    answer.clear();
    looks.clear();
    return;
  }
  predict(digit);
  explain(digit);
}

const pad = makePad((strokes, finished) => show(strokes.length ? { kind: "drawing", strokes, finished } : null));
const pictures = makePictures((pixels) => show({ kind: "picture", pixels, finished: true }));
const mistakes = makeMistakes((mistake) => show({ kind: "mistake", finished: true, ...mistake }));

// Tabs, as in the WAI-ARIA practices: arrows move between them, one stop of the Tab key for all.
const tabs = [...document.querySelectorAll("[role=tab]")];

function open(tab, focus) {
  for (const other of tabs) {
    const selected = other === tab;
    other.setAttribute("aria-selected", selected);
    other.tabIndex = selected ? 0 : -1;
    element(other.getAttribute("aria-controls")).hidden = !selected;
  }
  if (focus) tab.focus();
  document.querySelector("main").dataset.view = tab.id.slice(4);
  history.replaceState(null, "", `#${tab.id.slice(4)}`);
  if (tab.id === "tab-draw") pad.resize();
  if (tab.id === "tab-mistakes") mistakes.load();
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => open(tab, false));
  tab.addEventListener("keydown", (event) => {
    const places = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    open(tabs.at(places[event.key] % tabs.length), true);
  });
});

// Pictures may be pasted and dropped anywhere: elsewhere a browser would leave the page for a file dropped on it.
function take(file) {
  if (!file) return;
  open(element("tab-picture"), false);
  pictures.read(file);
}
document.addEventListener("paste", (event) =>
  take([...event.clipboardData.files].find((each) => each.type.startsWith("image/"))),
);
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});

answer.clear();
looks.clear();
open(element(`tab-${location.hash.slice(1)}`) ?? tabs[0], false);
ask("api/run").then(
  (run) => {
    const accuracy = run.test_accuracy === null ? "" : `, ${(100 * run.test_accuracy).toFixed(2)} % right on the test set`;
    const networks = run.members > 1 ? `${run.members} networks that answer together, ` : "";
    if (run.members > 1) element("layers-whose").textContent = `These are of the first of the ${run.members} networks.`;
    element("run").textContent =
      `Run ${run.name}: ${networks}${run.parameters.toLocaleString("en")} parameters, trained on ${run.dataset}${accuracy}.`;
    answer.describe(run.threshold);
  },
  (error) => showProblem(error.message),
);
