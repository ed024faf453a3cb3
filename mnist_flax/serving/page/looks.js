// What the network sees, which pixels mattered, and the maps of each layer.
import { element } from "./dom.js";

const FOR = [230, 140, 0]; // told apart from the next by colour-blind people too (Okabe and Ito)
const AGAINST = [60, 150, 230];
// From dark to light: levels stay in order in grey, too.
const RAMP = [[0, 0, 4], [65, 15, 110], [150, 40, 100], [225, 90, 50], [250, 175, 60], [252, 255, 200]];

const CAPTIONS = {
  seen: {
    drawing: "28 × 28 pixels: your strokes redrawn with a pen as wide as MNIST's, fitted into 20 × 20 and centred by their mass.",
    picture: "28 × 28 pixels: the ink found in the picture, fitted into 20 × 20 and centred by its mass, as in MNIST.",
    mistake: "28 × 28 pixels, as the test set has them.",
    nothing: "28 × 28 pixels, white where there is ink.",
  },
  occlusion: (about) =>
    `Each 5 × 5 patch is covered in turn: orange is ink that speaks for ${about} (without it the odds fall), blue ink that speaks against it.`,
  gradient: (about) =>
    `Where a little more ink would raise the odds of ${about} (orange) or lower them (blue), by the gradient of the network.`,
  nothing: "Draw or choose a digit, and see which parts of it decide.",
};

export function colour(level) {
  const place = (level / 255) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((x, i) => x + (place - low) * (RAMP[low + 1][i] - x));
}
const COLOURS = Array.from({ length: 256 }, (_, level) => colour(level));

/** Paints rows of grey levels, 255 white. */
export function paintDigit(canvas, pixels) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(28, 28);
  pixels.flat().forEach((level, i) => image.data.set([level, level, level, 255], 4 * i));
  context.putImageData(image, 0, 0);
}

/** Paints the digit in dark grey under a map of what speaks for and against it. */
function paintMap(canvas, pixels, map) {
  const largest = Math.max(...map.flat().map(Math.abs), 1e-9);
  const small = new OffscreenCanvas(28, 28);
  const context = small.getContext("2d");
  const image = context.createImageData(28, 28);
  map.flat().forEach((value, i) => {
    const share = Math.abs(value) / largest;
    const grey = 0.45 * pixels.flat()[i];
    const mixed = (value > 0 ? FOR : AGAINST).map((x) => (1 - share) * grey + share * x);
    image.data.set([...mixed, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  const target = canvas.getContext("2d");
  target.imageSmoothingEnabled = false;
  target.drawImage(small, 0, 0, canvas.width, canvas.height);
}

/** Paints the maps of a layer side by side. */
function paintLayer(canvas, { shape, values }) {
  const bytes = Uint8Array.from(atob(values), (character) => character.charCodeAt(0));
  const [count, height, width] = shape.length === 3 ? shape : [shape[0], 1, 1];
  const gap = shape.length === 3 ? 1 : 0;
  const columns = Math.ceil(Math.sqrt(2 * count)); // twice as wide as high
  const rows = Math.ceil(count / columns);
  canvas.width = columns * (width + gap) - gap;
  canvas.height = rows * (height + gap) - gap;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let map = 0; map < count; map++) {
    const left = (map % columns) * (width + gap);
    const top = Math.floor(map / columns) * (height + gap);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const level = bytes[(map * height + y) * width + x];
        image.data.set([...COLOURS[level], 255], 4 * ((top + y) * canvas.width + left + x));
      }
    }
  }
  context.putImageData(image, 0, 0);
}

function describe({ shape }, position) {
  if (shape.length === 1) return [`Layer ${position}: dense`, `${shape[0]} features of the digit as a whole, a square each.`];
  const [count, height, width] = shape;
  return [
    `Layer ${position}: convolution`,
    `${count} features, each looked for at ${height} × ${width} places.`,
  ];
}

export function makeLooks() {
  let last = null;
  const method = () => document.querySelector("[name=method]:checked").value;

  function mattered() {
    if (!last) return;
    paintMap(element("mattered"), last.pixels, last[method()]);
    element("mattered-caption").textContent = CAPTIONS[method()](last.about);
  }
  for (const radio of document.querySelectorAll("[name=method]")) radio.addEventListener("change", mattered);

  function layer(described, i) {
    let figure = element("layers").children[i];
    if (!figure) {
      figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      const canvas = document.createElement("canvas");
      const [heading, sentence] = describe(described, i + 1);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${heading}: maps of ${described.shape[0]} features`);
      caption.append(Object.assign(document.createElement("b"), { textContent: heading }), sentence);
      figure.append(canvas, caption);
      element("layers").append(figure);
    }
    paintLayer(figure.firstChild, described);
  }

  return {
    show(result, digit) {
      last = result;
      paintDigit(element("seen"), result.pixels);
      element("seen-caption").textContent = CAPTIONS.seen[digit.kind];
      mattered();
      result.layers.forEach(layer);
    },
    clear() {
      last = null;
      for (const canvas of document.querySelectorAll(".pixels, #layers canvas")) {
        canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
      }
      element("seen-caption").textContent = CAPTIONS.seen.nothing;
      element("mattered-caption").textContent = CAPTIONS.nothing;
    },
  };
}
