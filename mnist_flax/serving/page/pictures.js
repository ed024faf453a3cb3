// Photos and forms: they go to the server and come back annotated.
import { ask } from "./api.js";
import { element } from "./dom.js";

/** `chosen(pixels)` is called with the pixels of a digit that was pressed. */
export function makePictures(chosen) {
  const drop = element("drop");
  let file = null;
  let reading = 0; // number of the latest

  function digitButton(digit) {
    const button = document.createElement("button");
    const sure = digit.digit !== null;
    const share = `${(100 * digit.confidence).toFixed(1)} %`;
    button.textContent = sure ? digit.digit : "?";
    button.className = sure ? "" : "unsure";
    button.title = `${digit.likeliest}: ${share}`;
    button.setAttribute("aria-label", sure ? `${digit.digit}, ${share}` : `doubtful, likeliest ${digit.likeliest}, ${share}`);
    button.addEventListener("click", () => {
      for (const other of element("lines").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      chosen(digit.pixels);
    });
    return button;
  }

  function show(result) {
    element("annotated").src = result.annotated;
    const lines = result.lines.map((line) => {
      const row = document.createElement("div");
      row.append(
        ...line.numbers.map((number) => {
          const group = document.createElement("span");
          group.append(...number.digits.map(digitButton));
          return group;
        }),
      );
      return row;
    });
    element("lines").replaceChildren(...lines);
    element("picture-result").hidden = false;
    const digits = result.lines.flatMap((line) => line.numbers.flatMap((number) => number.digits));
    const doubtful = digits.filter((digit) => digit.digit === null).length;
    const found = digits.length === 1 ? "1 digit" : `${digits.length} digits`;
    if (!digits.length) return "No digit was found in the picture.";
    return `${found} found${doubtful ? `, ${doubtful} too doubtful to answer` : ""}.`;
  }

  async function read(next) {
    file = next;
    const turn = ++reading;
    const layout = document.querySelector("[name=layout]:checked").value;
    element("picture-status").textContent = `Reading ${file.name} …`;
    const sentence = await ask(`api/predict?layout=${layout}&annotated=true`, file, file.type || "application/octet-stream").then(
      (result) => (turn === reading ? show(result) : ""),
      (error) => {
        if (turn === reading) element("picture-result").hidden = true;
        return error.message;
      },
    );
    if (turn === reading) element("picture-status").textContent = sentence;
  }

  element("file").addEventListener("change", (event) => {
    if (event.target.files[0]) read(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  for (const radio of document.querySelectorAll("[name=layout]")) radio.addEventListener("change", () => file && read(file));
  drop.addEventListener("dragover", () => drop.classList.add("over"));
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
  return { read };
}
