"""Reading a picture: from grey levels to numbers, with every digit's place and probabilities."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mnist_flax.inference.classifier import Classify
from mnist_flax.ocr import binarize, reading_order, ruled_lines, segment
from mnist_flax.ocr.decode import Grey
from mnist_flax.ocr.segment import Span
from mnist_flax.runtime.cli import UserError

Layout = Literal["digit", "line", "page"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
UNREADABLE = "?"
SMALLEST = 6.0  # pixels: what is lower is no digit but noise
MOST_MARKS = {"digit": 3_000, "line": 500, "page": 3_000}  # more than there can be digits; each takes its time
WORKING_PIXELS = 6_000_000  # larger pictures are reduced: an A4 page at 250 dots an inch


class Digit(NamedTuple):
    text: str  # one of 0 to 9, or "?"
    likeliest: int  # the answer if there were no "?"
    confidence: float  # probability of the likeliest
    probabilities: tuple[float, ...]
    box: tuple[float, float, float, float]  # left, top, right, bottom in the picture's pixels
    image: UInt8[np.ndarray, "28 28"]  # what the network saw

    @property
    def answered(self) -> bool:
        return self.text != UNREADABLE


class Number(NamedTuple):
    digits: tuple[Digit, ...]

    @property
    def text(self) -> str:
        return "".join(digit.text for digit in self.digits)


class Reading(NamedTuple):
    """What a picture says: lines from top to bottom, of numbers from left to right."""

    lines: tuple[tuple[Number, ...], ...]

    @property
    def text(self) -> str:
        return "\n".join(" ".join(number.text for number in line) for line in self.lines)

    @property
    def digits(self) -> list[Digit]:
        return [digit for line in self.lines for number in line for digit in number.digits]


class Sheet(NamedTuple):
    """A picture in which what may be digits was found, not yet recognised."""

    lattices: tuple[tuple[Span, ...], ...]  # one a line
    height: float  # of a digit
    separators: np.ndarray  # printed vertical lines
    to_picture: Float[np.ndarray, "2 3"]  # from this sheet's pixels to the picture's


def require_packages() -> None:
    """Raises UserError unless the extra that finds digits is installed."""
    try:
        import scipy.ndimage  # noqa: F401
        import skimage.filters  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'mnist_flax[predict]'") from error


def read(pictures: Sequence[Grey], layout: str, classifier: Classify, threshold: float) -> list[Reading]:
    """Reads pictures; all their digits go through the classifier at once.

    Args:
      pictures: grey levels, 0 black to 1 white, as `decode.load` gives them.
      layout: `digit` (each picture is one digit), `line` (one line of numbers) or `page`.
      classifier: log probabilities of digits in MNIST's form.
      threshold: least probability of an answer; below, the answer is "?".
    """
    return recognise([find(picture, layout) for picture in pictures], classifier, threshold)


def find(picture: Grey, layout: str) -> Sheet:
    """Finds what may be digits in a picture.

    Raises UserError for one with more marks than there can be digits.
    """
    grey, to_picture = _resized(picture, max(1.0, math.sqrt(picture.size / WORKING_PIXELS)))
    # On a page no digit is as long as this; elsewhere one may fill the picture.
    longest = 0.3 * max(grey.shape) if layout == "page" else math.inf
    ink = binarize.find_ink(grey)
    if layout != "digit" and (degrees := ruled_lines.tilt(ink.mask)):
        grey, to_picture = _turned(grey, degrees, to_picture)
        ink = binarize.find_ink(grey)
    ink = ruled_lines.remove_longest_rules(ink, longest)
    ink, thin = ruled_lines.remove_rules(
        ink, ruled_lines.digit_height(ink.mask)
    )  # the thinnest do not outlive smoothing
    height = ruled_lines.digit_height(ink.mask)
    if height < SMALLEST:
        return Sheet((), 0.0, np.zeros((1, 1), bool), to_picture)
    ink, separators = ruled_lines.remove_rules(binarize.find_ink(grey, height), height)
    separators |= thin
    marks = segment.find_marks(ink, height)
    if len(marks.boxes) > MOST_MARKS[layout]:
        count, most = len(marks.boxes), MOST_MARKS[layout]
        what = "picture of one digit" if layout == "digit" else f"{layout} of digits"
        raise UserError(f"this is no {what}: it has {count:,} marks of ink, where {most:,} is the limit")
    if layout == "digit":
        lattices = [segment.whole(ink, marks)] if marks.boxes else []
    elif layout == "line":
        lattices = [segment.spans_of_line(ink, marks, list(marks.boxes))] if marks.boxes else []
    else:
        lattices = [segment.spans_of_line(ink, marks, line) for line in reading_order.find_lines(marks)]
    return Sheet(tuple(map(tuple, lattices)), height, separators, to_picture)


def recognise(sheets: Sequence[Sheet], classifier: Classify, threshold: float) -> list[Reading]:
    """Reads sheets; all their spans go through the classifier at once."""
    spans = [span for sheet in sheets for lattice in sheet.lattices for span in lattice]
    if not spans:
        return [Reading(()) for _ in sheets]
    scores = iter(classifier(np.stack([span.image for span in spans])))
    return [
        Reading(_lines(sheet, [np.stack([next(scores) for _ in lattice]) for lattice in sheet.lattices], threshold))
        for sheet in sheets
    ]


def _lines(
    sheet: Sheet, scores: Sequence[Float[np.ndarray, "spans classes"]], threshold: float
) -> tuple[tuple[Number, ...], ...]:
    """The numbers of each line: the best path through its lattice, parted where a number ends."""
    paths = [
        segment.best_path(lattice, each.max(axis=1), sheet.height)
        for lattice, each in zip(sheet.lattices, scores, strict=True)
    ]
    boxes = [[lattice[i].box for i in path] for lattice, path in zip(sheet.lattices, paths, strict=True)]
    breaks = reading_order.number_breaks(boxes, sheet.height, sheet.separators)
    lines = []
    for lattice, each, path, ends in zip(sheet.lattices, scores, paths, breaks, strict=True):
        numbers: list[list[Digit]] = []
        for index, new in zip(path, [True, *ends], strict=True):
            if new:
                numbers.append([])
            numbers[-1].append(_digit(lattice[index], each[index], sheet.to_picture, threshold))
        lines.append(tuple(Number(tuple(number)) for number in numbers))
    return tuple(lines)


def _digit(span: Span, scores: Float[np.ndarray, " classes"], to_picture: np.ndarray, threshold: float) -> Digit:
    probabilities = np.exp(scores)
    likeliest = int(probabilities.argmax())
    confidence = float(probabilities[likeliest])
    text = str(likeliest) if confidence >= threshold else UNREADABLE
    box = _box_in_picture(span.box, to_picture)
    return Digit(text, likeliest, confidence, tuple(map(float, probabilities)), box, span.image)


def to_json(reading: Reading) -> dict[str, Any]:
    """A reading as JSON: `text`, and `lines` of `numbers` of `digits`, each with `box`, `confidence`, `probabilities`.

    Boxes are [left, top, right, bottom] in pixels of the upright picture; probabilities are of 0 to 9. `digit` is
    null where the answer is "?"; `likeliest` is what it would be.
    """
    return {
        "text": reading.text,
        "lines": [
            {
                "text": " ".join(number.text for number in line),
                "numbers": [
                    {"text": number.text, "digits": [digit_to_json(digit) for digit in number.digits]}
                    for number in line
                ],
            }
            for line in reading.lines
        ],
    }


def digit_to_json(digit: Digit) -> dict[str, Any]:
    return {
        "digit": digit.likeliest if digit.answered else None,
        "likeliest": digit.likeliest,
        "box": [round(edge, 1) for edge in digit.box],
        "confidence": round(digit.confidence, 6),
        "probabilities": [round(p, 6) for p in digit.probabilities],
    }


def _resized(picture: Grey, factor: float) -> tuple[Grey, np.ndarray]:
    """The picture reduced by a factor, and the map back."""
    if factor == 1.0:
        return picture, np.array([[1.0, 0, 0], [0, 1.0, 0]])
    height, width = (max(1, round(n / factor)) for n in picture.shape)
    reduced = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))
    return reduced, np.array([[picture.shape[1] / width, 0, 0], [0, picture.shape[0] / height, 0]])


def _turned(grey: Grey, degrees: float, to_picture: np.ndarray) -> tuple[Grey, np.ndarray]:
    """The picture with rows that fall to the right by `degrees` made level, and the map back."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    height, width = grey.shape
    new_width = math.ceil(width * cos + height * abs(sin))
    new_height = math.ceil(height * cos + width * abs(sin))
    linear = np.array([[cos, -sin], [sin, cos]])
    offset = np.array([width / 2, height / 2]) - linear @ np.array([new_width / 2, new_height / 2])
    turn = np.column_stack([linear, offset])  # from the level sheet to the given one
    paper = float(np.median(grey))
    image = Image.fromarray(np.ascontiguousarray(grey))
    level = image.transform(
        (new_width, new_height),
        Image.Transform.AFFINE,
        turn.ravel().tolist(),
        Image.Resampling.BICUBIC,
        fillcolor=paper,
    )
    whole = np.vstack([to_picture, [0, 0, 1]]) @ np.vstack([turn, [0, 0, 1]])
    return np.clip(np.asarray(level), 0, 1), whole[:2]


def _box_in_picture(box: segment.Box, to_picture: np.ndarray) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    corners = np.array([[left, right, right, left], [top, top, bottom, bottom], [1, 1, 1, 1]])
    (x0, y0), (x1, y1) = (edge(to_picture @ corners, axis=1) for edge in (np.min, np.max))
    return float(x0), float(y0), float(x1), float(y1)
