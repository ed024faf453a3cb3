"""What the server takes and gives, as plain functions: bodies to images, results to JSON."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mnist_flax.inference.explain import Explanation
from mnist_flax.inference.mistakes import Mistakes
from mnist_flax.ocr import page_reader, strokes
from mnist_flax.ocr.decode import Grey
from mnist_flax.runtime.cli import UserError

MOST_POINTS = 10_000  # of a drawing
MOST_MISTAKES = 500  # that are listed
ANNOTATED_PIXELS = 1600  # longest side of an annotated copy

_FORMS = 'send {"pixels": 28 rows of 28 numbers from 0 to 255} or {"strokes": [[[x, y], ...], ...]}'


class Digit(NamedTuple):
    """A digit that a client drew or sent."""

    image: UInt8[np.ndarray, "28 28"]
    about: int | None  # the class that is to be explained


def parse_digit(body: bytes) -> Digit:
    """The digit in a JSON body: `pixels` as the network sees them, or `strokes` (see `strokes.render`).

    Raises UserError, with a sentence that says what is wrong.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is no JSON: {_FORMS}") from error
    if not isinstance(content, dict) or ("pixels" in content) == ("strokes" in content):
        raise UserError(f"the body holds no digit, or two: {_FORMS}")
    if unknown := sorted(set(content) - {"pixels", "strokes", "about"}):
        raise UserError(f"the body holds {', '.join(unknown)[:80]!r}, which nothing here knows: {_FORMS}")
    about = content.get("about")
    if about is not None and (isinstance(about, bool) or about not in range(10)):
        raise UserError('"about" is the digit to explain, from 0 to 9')
    image = _pixels(content["pixels"]) if "pixels" in content else strokes.render(_strokes(content["strokes"]))
    return Digit(image, None if about is None else int(about))


# Checked before NumPy sees them: of a list with one long text it would make an array of texts as long as that.
def _pixels(value: Any) -> UInt8[np.ndarray, "28 28"]:
    rows = value if isinstance(value, list) and len(value) == 28 else []
    whole = all(isinstance(row, list) and len(row) == 28 and all(map(_is_level, row)) for row in rows)
    if not rows or not whole:
        raise UserError('"pixels" are 28 rows of 28 whole numbers, from 0 for paper to 255 for ink')
    return np.array(rows, np.uint8)


def _is_level(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _strokes(value: Any) -> list[strokes.Stroke]:
    whole = isinstance(value, list) and all(isinstance(stroke, list) and stroke for stroke in value)
    points = [point for stroke in value for point in stroke] if whole else []
    if not 1 <= len(points) <= MOST_POINTS or not all(map(_is_point, points)):
        raise UserError(
            f'"strokes" are lists of points [x, y], each from 0 to 1, with one to {MOST_POINTS:,} points in all'
        )
    return value


def _is_point(value: Any) -> bool:
    sound = isinstance(value, list) and len(value) == 2 and all(type(number) in (int, float) for number in value)
    return sound and all(0 <= number <= 1 for number in value)  # false for NaN


class Choices(NamedTuple):
    """What is asked of a picture."""

    layout: str
    annotated: bool


def parse_choices(query: Sequence[tuple[str, str]]) -> Choices:
    """Raises UserError for a query parameter that is unknown or given twice, or a value that it cannot have."""
    known = {"layout": page_reader.LAYOUTS, "annotated": ("false", "true")}
    for name, value in query:
        if name not in known:
            raise UserError(f"there is no parameter {name[:40]!r}: there are {' and '.join(known)}")
        if value not in known[name]:
            raise UserError(f"{name} is one of {', '.join(known[name])}")
    chosen = dict(query)
    if len(chosen) < len(query):
        raise UserError("a parameter is given more than once: give each once")
    return Choices(chosen.get("layout", "digit"), chosen.get("annotated") == "true")


def digit_to_json(
    scores: Float[np.ndarray, " classes"], image: UInt8[np.ndarray, "28 28"], threshold: float
) -> dict[str, Any]:
    """What the network says of one digit, from its log probabilities, and the pixels that it saw."""
    probabilities = np.exp(scores)
    likeliest = int(probabilities.argmax())
    confidence = float(probabilities[likeliest])
    return {
        "digit": likeliest if confidence >= threshold else None,
        "likeliest": likeliest,
        "confidence": round(confidence, 6),
        "probabilities": [round(p, 6) for p in probabilities.tolist()],
        "pixels": image.tolist(),
    }


def reading_to_json(picture: Grey, result: page_reader.Reading, choices: Choices) -> dict[str, Any]:
    """A reading as the predict command gives it; annotated, with the picture and the pixels of each digit."""
    height, width = picture.shape
    content = {"layout": choices.layout, "width": width, "height": height, **page_reader.to_json(result)}
    if choices.annotated:
        content["annotated"] = _annotated(picture, result)
        images = iter(digit.image for digit in result.digits)
        for line in content["lines"]:
            for number in line["numbers"]:
                for digit in number["digits"]:
                    digit["pixels"] = next(images).tolist()
    return content


def _annotated(picture: Grey, result: page_reader.Reading) -> str:
    """The picture with what was read drawn on it, as the address of an image that holds its own data."""
    from mnist_flax.ocr import annotate

    image = annotate.annotate(picture, result)
    image.thumbnail((ANNOTATED_PIXELS, ANNOTATED_PIXELS))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def explanation_to_json(explanation: Explanation, about: int) -> dict[str, Any]:
    """Maps as rows of numbers; layers as bytes in base64: 255 is the layer's largest activation, 0 none.

    Layers of images are [channels, height, width].
    """
    return {
        "about": about,
        "gradient": np.round(explanation.gradient.astype(np.float64), 4).tolist(),
        "occlusion": np.round(explanation.occlusion.astype(np.float64), 4).tolist(),
        "layers": [
            {"name": name, **_levels(np.moveaxis(values, -1, 0))}
            for name, values in explanation.layers.items()
            if name != "logits"
        ],
    }


def _levels(values: Float[np.ndarray, "*shape"]) -> dict[str, Any]:
    largest = float(values.max(initial=0.0))
    levels = np.rint(values.clip(0) * (255 / largest if largest > 0 else 0.0)).astype(np.uint8)
    return {
        "shape": list(values.shape),
        "largest": round(largest, 4),
        "values": base64.b64encode(levels.tobytes()).decode(),
    }


def mistakes_to_json(found: Mistakes, threshold: float) -> dict[str, Any]:
    """The mistakes of a run, the surest first, at most `MOST_MISTAKES`."""
    return {
        "examples": found.examples,
        "errors": len(found.mistakes),
        "unanswered": found.unanswered,
        "doubtful": found.doubtful,
        "mistakes": [
            {"index": mistake.number, "label": mistake.label, **digit_to_json(mistake.scores, mistake.image, threshold)}
            for mistake in found.mistakes[:MOST_MISTAKES]
        ],
    }
