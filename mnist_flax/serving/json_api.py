"""What the server takes and gives, as plain functions: bodies to images, results to JSON."""

import base64
import io
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
from jaxtyping import Float, UInt8

from mnist_flax.inference.explain import Explanation
from mnist_flax.inference.mistakes import Mistakes
from mnist_flax.ocr import page_reader, strokes
from mnist_flax.ocr.decode import Grey
from mnist_flax.runtime import cli
from mnist_flax.runtime.cli import UserError
from mnist_flax.serving import schema

ANNOTATED_PIXELS = 1600  # longest side of an annotated copy

_FORMS = 'send {"pixels": 28 rows of 28 numbers from 0 to 255} or {"strokes": [[[x, y], ...], ...]}'


def parse_digit(body: bytes) -> tuple[UInt8[np.ndarray, "28 28"], int | None]:
    """The digit in a JSON body, `schema.Pixels` or `schema.Strokes`, and the class to explain.

    Raises UserError, with a sentence that says what is wrong.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        kind: type[schema.Pixels | schema.Strokes] = schema.Strokes if "strokes" in fields else schema.Pixels
        sent = msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not a digit in JSON ({cli.reason(error)}): {_FORMS}") from error
    image = np.array(sent.pixels, np.uint8) if isinstance(sent, schema.Pixels) else strokes.render(sent.strokes)
    return image, sent.about


def parse_choices(query: Sequence[tuple[str, str]]) -> schema.Choices:
    """Raises UserError for a query parameter that is unknown or given twice, or a value that it cannot have."""
    chosen = dict(query)
    if len(chosen) < len(query):
        raise UserError("a parameter is given more than once: give each once")
    try:
        return msgspec.convert(chosen, schema.Choices)
    except msgspec.ValidationError as error:
        known = (f"{name}={'|'.join(get_args(kind))}" for name, kind in get_type_hints(schema.Choices).items())
        raise UserError(f"{cli.reason(error)}: the parameters are {' and '.join(known)}") from error


def digit_to_json(
    scores: Float[np.ndarray, " classes"], image: UInt8[np.ndarray, "28 28"], threshold: float
) -> schema.Digit:
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


def reading_to_json(picture: Grey, result: page_reader.Reading, choices: schema.Choices) -> dict[str, Any]:
    """A reading as the predict command gives it; annotated, with the picture and the pixels of each digit."""
    height, width = picture.shape
    content = {"layout": choices.layout, "width": width, "height": height, **page_reader.to_json(result)}
    if choices.annotated == "true":
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


def explanation_to_json(answer: schema.Digit, explanation: Explanation, about: int) -> schema.Explanation:
    """The answer, with maps as rows of numbers, and layers as bytes in base64: 255 is the largest activation, 0 none.

    Layers of images are [channels, height, width].
    """
    return {
        **answer,
        "about": about,
        "gradient": np.round(explanation.gradient.astype(np.float64), 4).tolist(),
        "occlusion": np.round(explanation.occlusion.astype(np.float64), 4).tolist(),
        "layers": [
            _layer(name, np.moveaxis(values, -1, 0)) for name, values in explanation.layers.items() if name != "logits"
        ],
    }


def _layer(name: str, values: Float[np.ndarray, "*shape"]) -> schema.Layer:
    largest = float(values.max(initial=0.0))
    levels = np.rint(values.clip(0) * (255 / largest if largest > 0 else 0.0)).astype(np.uint8)
    return {
        "name": name,
        "shape": list(values.shape),
        "largest": round(largest, 4),
        "values": base64.b64encode(levels.tobytes()).decode(),
    }


def mistakes_to_json(found: Mistakes, threshold: float) -> schema.Mistakes:
    """The mistakes of a run, the surest first, at most `schema.MOST_MISTAKES`."""
    return {
        "examples": found.examples,
        "errors": len(found.mistakes),
        "unanswered": found.unanswered,
        "doubtful": found.doubtful,
        "mistakes": [
            {"index": mistake.number, "label": mistake.label, **digit_to_json(mistake.scores, mistake.image, threshold)}
            for mistake in found.mistakes[: schema.MOST_MISTAKES]
        ],
    }
