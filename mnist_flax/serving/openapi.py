"""The OpenAPI document of the server, made from the types of `schema`."""

from collections.abc import Sequence
from typing import Any

import msgspec

from mnist_flax.ocr import decode
from mnist_flax.serving import schema

_SEVEN = {"strokes": [[[0.3, 0.3], [0.7, 0.3], [0.5, 0.8]]]}
_PROBLEMS = {
    400: "The body, or a parameter, is not as described.",
    403: "A browser asks on behalf of another website.",
    404: "The test examples are not available.",
    408: "The body did not arrive in time.",
    413: "Too many bytes or pixels.",
    415: "Another Content-Type.",
    421: "The Host header does not name this server: use the address that it printed.",
    503: "Too many connections or uploads at a time, or the network does not answer: try again.",
}
_POST = (400, 403, 408, 413, 415, 503)
_BYTES = {"schema": {"type": "string", "format": "binary"}}


def document() -> dict[str, Any]:
    answers = (schema.Digit, schema.Reading, schema.Explanation, schema.Mistakes, schema.Run, schema.Health)
    types = (schema.Pixels, schema.Strokes, schema.Choices, *answers, schema.Problem)
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    parameters = [
        {"name": name, "in": "query", "description": field.pop("description"), "schema": field}
        for name, field in components.pop("Choices")["properties"].items()
    ]
    digit = _json(schema.Pixels, schema.Strokes)
    digit["application/json"]["examples"] = {"a seven": {"value": _SEVEN}}
    kinds = [*(f"image/{name.lower()}" for name in decode.FORMATS), "application/octet-stream"]
    predict = _operation(
        "predict",
        "Read a picture, or one digit",
        "What was read: a Digit for JSON, a Reading for a picture.",
        schema.Digit,
        schema.Reading,
        problems=_POST,
        description=f"An image file ({', '.join(decode.FORMATS)}; of several pages or frames the first) as the body is "
        "read by its layout; JSON is one digit, drawn or in MNIST's own form, and takes no parameters.",
        parameters=parameters,
        requestBody={"required": True, "content": dict.fromkeys(kinds, _BYTES) | digit},
    )
    explain = _operation(
        "explain",
        "Look inside the network as it reads a digit",
        "The answer, what each layer found, and which pixels mattered.",
        schema.Explanation,
        problems=_POST,
        requestBody={"required": True, "content": digit},
    )
    title = "What the run reads wrong on its test split"
    mistakes = _operation("mistakes", title, "The mistakes.", schema.Mistakes, problems=(404,))
    run = _operation("run", "Which run this is", "The run.", schema.Run)
    health = _operation(
        "health", "Whether digits can be read", "A digit was just read.", schema.Health, problems=(503,)
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mnist_flax",
            "version": "1",
            "description": "Reads handwritten digits with a trained run. "
            "Every refusal is JSON with a sentence in `error`.",
        },
        "paths": {
            "/api/predict": {"post": predict},
            "/api/explain": {"post": explain},
            "/api/mistakes": {"get": mistakes},
            "/api/run": {"get": run},
            "/healthz": {"get": health},
        },
        "components": {
            "schemas": components,
            "responses": {
                str(status): {"description": sentence, "content": _json(schema.Problem)}
                for status, sentence in _PROBLEMS.items()
            },
        },
    }


def _json(*kinds: type) -> dict[str, Any]:
    """Content that is JSON of one of several types."""
    references = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    return {"application/json": {"schema": references[0] if len(kinds) == 1 else {"oneOf": references}}}


def _operation(
    name: str, summary: str, sentence: str, *answers: type, problems: Sequence[int] = (), **more: Any
) -> dict[str, Any]:
    responses = {"200": {"description": sentence, "content": _json(*answers)}}
    responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in (*problems, 421)}
    return {"operationId": name, "summary": summary, **more, "responses": responses}
