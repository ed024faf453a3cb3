"""Forms filled in by many hands: pictures drawn from real digits, with what stands on them and where.

A form is drawn light to dark as a printer, a pen and a scanner or a camera would: paper, rules or boxes, digits of
random size, slant and ink, then light, blur, noise and JPEG. Everything derives from one generator.
"""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy import ndimage

Digits = tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, " n"]]


class Style(NamedTuple):
    """How a form looks. Ranges are (lowest, highest), drawn anew for each form or, of `slant`, each digit."""

    height: tuple[float, float] = (30, 64)  # pixels of the 20 x 20 box
    size_spread: float = 0.1  # of a digit's size within its form
    slant: float = 0.15  # tangent, uniform in +-slant
    thicken: tuple[float, float] = (0.0, 0.0)  # blur of the ink in MNIST pixels; sign as of a pen's width
    ink: tuple[float, float] = (0.0, 0.25)  # grey level
    paper: tuple[float, float] = (0.92, 1.0)
    shade: float = 0.0  # share of the light that is lost in the darkest corner
    noise: float = 0.0  # standard deviation of grey levels
    blur: float = 0.0  # pixels
    quality: int | None = None  # of JPEG; None stores without loss
    tilt: float = 0.0  # degrees, uniform in +-tilt
    dirt: int = 0  # specks
    touching: float = 0.0  # share of neighbours that touch, where digits have no boxes


CLEAN = Style()
DEGRADED = Style(
    size_spread=0.2,
    slant=0.3,
    thicken=(-0.4, 0.5),
    ink=(0.05, 0.4),
    paper=(0.75, 0.95),
    shade=0.45,
    noise=0.05,
    blur=0.8,
    quality=45,
    tilt=2.0,
    dirt=25,
)
JOINED = Style(touching=0.4)
PAPERS = ("plain", "ruled", "boxed", "grid")


class Form(NamedTuple):
    """A picture and what it says: lines of numbers from top to bottom, and each digit's place."""

    image: UInt8[np.ndarray, "height width"]
    lines: tuple[tuple[str, ...], ...]
    boxes: Float[np.ndarray, "digits 4"]  # left, top, right, bottom in reading order


def draw(
    digits: Digits,
    generator: np.random.Generator,
    style: Style = CLEAN,
    paper: str = "plain",
    lines: int = 4,
    numbers: int = 3,
    most_digits: int = 5,
    inverted: bool = False,
) -> Form:
    """A form of `lines` lines of `numbers` numbers, each of 1 to `most_digits` digits drawn from `digits`."""
    uniform = generator.uniform
    height = uniform(*style.height)
    pen = uniform(*style.thicken)
    layout = _lay_out(digits, generator, style, paper, lines, numbers, most_digits, height, pen)
    shade = np.ones(layout.shape, np.float32)  # transmission of printed rules and of ink
    thickness = max(1, round(height * uniform(0.02, 0.05)))
    print_rules(shade, paper, layout.combs, height, thickness, uniform(0.1, 0.55))
    tone_ink, tone_paper = uniform(*style.ink), uniform(*style.paper)
    for glyph, top, left in layout.ink:
        h, w = glyph.shape
        region = shade[top : top + h, left : left + w]
        part = glyph[: region.shape[0], : region.shape[1]]
        np.minimum(region, 1 - part * (1 - tone_ink), out=region)
    image = degrade(shade * tone_paper, generator, style)
    image, boxes_array = tilt(image, np.array(layout.boxes, float), uniform(-style.tilt, style.tilt))
    if inverted:
        image = 1 - image
    levels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    if style.quality:
        file = io.BytesIO()
        Image.fromarray(levels).save(file, format="JPEG", quality=style.quality)
        levels = np.asarray(Image.open(file))
    return Form(levels, layout.text, boxes_array)


class _Layout(NamedTuple):
    """What stands where on a form, in pixels."""

    shape: tuple[int, int]
    ink: list[tuple[Float[np.ndarray, "h w"], int, int]]  # a glyph, its top and its left
    combs: list[tuple[float, float, float, int]]  # rows of boxes: left, top, a box's side, number of boxes
    boxes: list[tuple[int, int, int, int]]  # of the digits: left, top, right, bottom
    text: tuple[tuple[str, ...], ...]


def _lay_out(digits, generator, style, paper, lines, numbers, most_digits, height, pen) -> _Layout:
    """Places digits drawn at random; arguments are those of `draw`, a digit's height and the pen's width."""
    images, labels = digits
    uniform = generator.uniform
    cell = height * 1.45
    margin, pitch_y = _margin(height), _pitch(height, paper)
    ink, combs, boxes, text = [], [], [], []
    right_edge = 0.0
    y = margin + height
    for _ in range(lines):
        x, row = float(margin), []
        for _ in range(numbers):
            count = int(generator.integers(1, most_digits + 1))
            picks = generator.integers(0, len(labels), count)
            if paper == "boxed":
                combs.append((x, y - cell / 2, cell, count))
            before = None
            for i, pick in enumerate(picks):
                size = height * uniform(1 - style.size_spread, 1 + style.size_spread)
                glyph = pen_stroke(images[pick], size, uniform(-style.slant, style.slant), pen)
                h, w = glyph.shape
                if paper == "boxed":
                    left = x + (i + 0.5) * cell - w / 2 + uniform(-0.06, 0.06) * height
                else:
                    left = x
                    x += w + height * uniform(0.1, 0.3)
                top = y - h / 2 + uniform(-0.07, 0.07) * height
                if before and paper != "boxed" and uniform() < style.touching:
                    left = touching(*before, glyph, int(top))
                    x = left + w + height * uniform(0.1, 0.3)
                before = (glyph, int(top), int(left))
                ink.append(before)
                boxes.append((int(left), int(top), int(left) + w, int(top) + h))
            x = x + count * cell + height if paper == "boxed" else x + height * uniform(0.9, 1.4)
            row.append("".join(str(labels[pick]) for pick in picks))
        right_edge = max(right_edge, x)
        text.append(tuple(row))
        y += pitch_y
    shape = int(y - pitch_y + height / 2 + margin), int(right_edge + margin)
    return _Layout(shape, ink, combs, boxes, tuple(text))


def _margin(height: float) -> int:
    return int(1.2 * height)


def _pitch(height: float, paper: str) -> float:
    """From line to line."""
    return height * (2.0 if paper in ("plain", "grid") else 1.9)


def pen_stroke(
    image: UInt8[np.ndarray, "28 28"], size: float, slant: float, pen: float
) -> Float[np.ndarray, "height width"]:
    """A digit enlarged so that MNIST's 20 pixels become `size`, slanted, with a wider or narrower pen; cropped."""
    scale = 8
    large = np.asarray(Image.fromarray(image).resize((28 * scale,) * 2, Image.Resampling.BICUBIC), np.float32) / 255
    middle = (large.shape[0] - 1) / 2
    matrix = np.array([[1, 0], [slant, 1]])
    large = ndimage.affine_transform(large, matrix, [0, -slant * middle], order=1)
    if pen:
        distance = ndimage.distance_transform_edt(large < 0.5) - ndimage.distance_transform_edt(large >= 0.5)
        thinned = distance < pen * scale
        large = ndimage.gaussian_filter(thinned.astype(np.float32), scale / 3)
    rows, columns = (np.flatnonzero((large > 0.3).any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((1, 1), np.float32)
    crop = large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = size / (20 * scale)
    shape = max(2, round(crop.shape[1] * factor)), max(2, round(crop.shape[0] * factor))
    return np.clip(np.asarray(Image.fromarray(crop).resize(shape, Image.Resampling.BOX)), 0, 1)


def touching(glyph, top: int, left: int, other, other_top: int) -> int:
    """Where the left edge of the other digit goes, so that its ink just overlaps that of the one before."""
    rows = range(max(top, other_top), min(top + len(glyph), other_top + len(other)))
    contacts = [left + glyph.shape[1]]
    for y in rows:
        mine, its = np.flatnonzero(glyph[y - top] > 0.5), np.flatnonzero(other[y - other_top] > 0.5)
        if len(mine) and len(its):
            contacts.append(left + int(mine[-1]) - int(its[0]) - 1)
    return max(contacts[1:], default=contacts[0])


def print_rules(shade, paper, combs, height, thickness, tone) -> None:
    """Prints rules on the paper, in place: a line under each row, boxes around the digits, or squared paper."""
    rows, columns = shade.shape
    if paper == "ruled":
        for y in np.arange(_margin(height) + height * 1.55, rows, _pitch(height, paper)):
            shade[int(y) : int(y) + thickness] = tone
    if paper == "grid":
        step = height * 0.62
        for y in np.arange(step / 2, rows, step):
            shade[int(y) : int(y) + thickness] = 0.5 + tone / 2
        for x in np.arange(step / 2, columns, step):
            shade[:, int(x) : int(x) + thickness] = 0.5 + tone / 2
    for x, y, side, count in combs:
        top, bottom, left, right = int(y), int(y + side), int(x), int(x + count * side)
        for edge in (top, bottom):
            shade[edge : edge + thickness, left : right + thickness] = tone
        for edge in x + side * np.arange(count + 1):
            shade[top : bottom + thickness, int(edge) : int(edge) + thickness] = tone


def degrade(image: Float[np.ndarray, "h w"], generator, style: Style) -> Float[np.ndarray, "h w"]:
    """Light that falls off to one side, a lens, a sensor and dirt."""
    rows, columns = image.shape
    image = image.copy()
    for _ in range(style.dirt):
        y, x, r = generator.integers(rows), generator.integers(columns), generator.integers(1, 3)
        image[max(0, y - r) : y + r, max(0, x - r) : x + r] *= generator.uniform(0.3, 0.8)
    if style.shade:
        angle = generator.uniform(0, 2 * np.pi)
        y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
        ramp = (x * np.cos(angle) + y * np.sin(angle)) / (abs(np.cos(angle)) + abs(np.sin(angle)))
        image = image * (1 - generator.uniform(0, style.shade) * (1 + ramp) / 2)
    if style.blur:
        image = ndimage.gaussian_filter(image, generator.uniform(0, style.blur))
    if style.noise:
        image = image + generator.normal(0, generator.uniform(0, style.noise), image.shape)
    return image


def tilt(image, boxes, degrees: float):
    """Turns the picture about its middle; boxes become those around the turned ones."""
    if not degrees:
        return image, boxes
    paper = float(np.median(image))
    turned = ndimage.rotate(image, degrees, reshape=False, order=1, mode="nearest", cval=paper)
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    centre = np.array([image.shape[1] - 1, image.shape[0] - 1]) / 2
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - centre
    corners = corners @ np.array([[cos, -sin], [sin, cos]]) + centre
    return turned, np.concatenate([corners.min(1), corners.max(1)], axis=1)
