"""Digits drawn by hand, as strokes: redrawn in MNIST's form, whatever the pad's size and the drawing's place."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mnist_flax.data.mnist_format import BOX, SIZE, mnist_form

Stroke = Sequence[tuple[float, float]]  # points (x, y), to the right and down, in sides of the pad

PEN = 2.8  # pixels across a stroke in MNIST: its median, ink over the length of the skeleton
SMALLEST = 0.05  # sides of the pad: what is drawn smaller is a dot
_SCALE = 8  # a pixel is drawn as so many squared


def render(strokes: Sequence[Stroke]) -> UInt8[np.ndarray, "28 28"]:
    """MNIST's form of a drawing, 255 being ink: all zeros if there are no points.

    The pen is as wide as those that MNIST was written with, however large the digit was drawn.
    """
    points = np.array([point for stroke in strokes for point in stroke], np.float64).reshape(-1, 2)
    if not len(points):
        return np.zeros((SIZE, SIZE), np.uint8)
    low, high = points.min(axis=0), points.max(axis=0)
    extent = max(float((high - low).max()), SMALLEST)
    scale, width = _SCALE * (BOX - PEN) / extent, _SCALE * PEN
    size = np.ceil((high - low) * scale + width).astype(int) + 2
    ink = Image.new("L", (int(size[0]), int(size[1])))
    draw = ImageDraw.Draw(ink)
    for stroke in strokes:
        path = (np.array(stroke, np.float64).reshape(-1, 2) - low) * scale + width / 2 + 1
        draw.line(path.ravel().tolist(), 255, round(width))
        for x, y in path.tolist():  # round ends and joints
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
    return mnist_form(np.asarray(ink, np.float32) / 255)
