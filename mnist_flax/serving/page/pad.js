// The drawing pad: strokes by mouse, finger, pen or keyboard, in sides of the pad.
import { element } from "./dom.js";

const PEN = 0.075; // sides of the pad
const STEP = 0.025; // of the keyboard's pen
const clamp = (x) => Math.min(1, Math.max(0, x));

/** `changed(strokes, finished)` is called with a copy whenever the drawing changed; `finished`: the pen is up. */
export function makePad(changed) {
  const canvas = element("pad");
  let strokes = [];
  let pointer = null; // which pointer draws
  let cursor = [0.5, 0.5]; // of the keyboard's pen
  let down = false; // whether the keyboard's pen is
  let byKeyboard = false;

  function paint() {
    const side = canvas.width;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, side, side);
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = "#111";
    context.lineWidth = PEN * side;
    for (const stroke of strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
      for (const [x, y] of stroke) context.lineTo(x * side, y * side);
      context.stroke();
    }
    if (byKeyboard && document.activeElement === canvas) {
      const [x, y] = [cursor[0] * side, cursor[1] * side];
      context.beginPath();
      context.arc(x, y, 0.6 * PEN * side, 0, 2 * Math.PI);
      context.lineWidth = 0.008 * side;
      context.strokeStyle = down ? "#c2410c" : "#0a58a8";
      context.stroke();
    }
    element("pad-hint").hidden = strokes.length > 0;
    element("undo").disabled = element("clear").disabled = !strokes.length;
  }

  let scheduled = false;
  function update() {
    if (!scheduled) requestAnimationFrame(() => ((scheduled = false), paint()));
    scheduled = true;
    changed(strokes.map((stroke) => [...stroke]), pointer === null && !down);
  }

  /** The canvas has as many pixels as it takes on the screen. */
  function resize() {
    const side = Math.round(canvas.clientWidth * devicePixelRatio);
    if (side && side !== canvas.width) canvas.width = canvas.height = side;
    paint();
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    const round = (x) => Math.round(1000 * clamp(x)) / 1000;
    return [round((event.clientX - box.left) / box.width), round((event.clientY - box.top) / box.height)];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (pointer !== null || event.button > 0) return;
    pointer = event.pointerId;
    canvas.setPointerCapture(pointer);
    byKeyboard = down = false;
    strokes.push([place(event)]);
    update();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    const moves = event.getCoalescedEvents?.() ?? [];
    strokes.at(-1).push(...(moves.length ? moves : [event]).map(place));
    update();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      if (event.pointerId !== pointer) return;
      pointer = null;
      update();
    });
  }

  function undo() {
    strokes.pop();
    lift();
  }
  function clear() {
    strokes = [];
    lift();
  }
  /** Ends the stroke that is being drawn, which may just be gone: what the pen does next is no part of another. */
  function lift() {
    pointer = null;
    down = false;
    update();
  }
  element("undo").addEventListener("click", undo);
  element("clear").addEventListener("click", clear);

  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (pointer !== null || (event.ctrlKey && event.key !== "z") || event.altKey || event.metaKey) return;
    if (event.key in moves) {
      cursor = cursor.map((x, axis) => Math.round(1000 * clamp(x + STEP * moves[event.key][axis])) / 1000);
      if (down) strokes.at(-1).push([...cursor]);
    } else if (event.key === " " || event.key === "Enter") {
      if (event.repeat) return event.preventDefault();
      down = !down;
      if (down) strokes.push([[...cursor]]);
    } else if (event.key === "Backspace" || (event.ctrlKey && event.key === "z")) undo();
    else if (event.key === "Escape" || event.key === "Delete") clear();
    else return;
    event.preventDefault();
    byKeyboard = true;
    update();
  });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, paint);
  canvas.addEventListener("blur", () => {
    if (down) ((down = false), update());
  });
  new ResizeObserver(resize).observe(canvas);
  return { resize };
}
