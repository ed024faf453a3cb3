"""The JSON that the API takes and gives, as types: requests are validated against them, and describe it (`openapi`)."""

from typing import Annotated, Literal, NotRequired, TypedDict, TypeVar

from msgspec import Meta, Struct

from mnist_flax.ocr import page_reader

T = TypeVar("T")
_Side = Meta(min_length=28, max_length=28)
Grid = Annotated[list[Annotated[list[T], _Side]], _Side]  # rows from the top
Level = Annotated[int, Meta(ge=0, le=255)]
Class = Annotated[int, Meta(ge=0, le=9)]
Share = Annotated[float, Meta(ge=0, le=1)]

MOST_POINTS = 10_000  # of a drawing
MOST_MISTAKES = 500  # that are listed


# Requests

_About = Annotated[Class | None, Meta(description="The digit to explain, by /api/explain; by default the likeliest.")]


class Pixels(Struct, forbid_unknown_fields=True):
    """One digit as the network sees it."""

    pixels: Annotated[
        Grid[Level],
        Meta(description="MNIST's own form: 0 paper, 255 ink, in a 20 x 20 box whose center of mass is in the middle."),
    ]
    about: _About = None


class Strokes(Struct, forbid_unknown_fields=True):
    """One digit as it was drawn."""

    strokes: Annotated[
        list[Annotated[list[tuple[Share, Share]], Meta(min_length=1)]],
        Meta(
            min_length=1,
            description="Lines of points [x, y], to the right and down, in sides of the pad; "
            f"{MOST_POINTS:,} points at most. They are redrawn in MNIST's form.",
        ),
    ]
    about: _About = None

    def __post_init__(self) -> None:
        if sum(map(len, self.strokes)) > MOST_POINTS:
            raise ValueError(f"`strokes` hold more than {MOST_POINTS:,} points in all")


class Choices(Struct, forbid_unknown_fields=True):
    """What is asked of a picture, in the query."""

    layout: Annotated[page_reader.Layout, Meta(description="What the picture shows.")] = "digit"
    annotated: Annotated[
        Literal["false", "true"],
        Meta(description="Also return a copy with the answers drawn in, and the pixels of each digit."),
    ] = "false"


# Answers


class Answer(TypedDict):
    digit: Annotated[Class | None, Meta(description="The answer; null where it is too doubtful to be one.")]
    likeliest: Class
    confidence: Annotated[Share, Meta(description="Probability of the likeliest.")]
    probabilities: Annotated[
        list[Share], Meta(min_length=10, max_length=10, description="Of 0 to 9, calibrated on validation data.")
    ]


class Digit(Answer):
    pixels: Annotated[Grid[Level], Meta(description="What the network saw.")]


class FoundDigit(Answer):
    box: Annotated[
        list[float],
        Meta(min_length=4, max_length=4, description="Left, top, right, bottom in pixels of the upright picture."),
    ]
    pixels: NotRequired[Grid[Level]]


class Number(TypedDict):
    text: str
    digits: list[FoundDigit]


class Line(TypedDict):
    text: str
    numbers: list[Number]


class Reading(TypedDict):
    layout: page_reader.Layout
    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]
    text: Annotated[
        str, Meta(pattern=r"^[0-9? \n]*$", description="Lines of numbers; ? is a digit that is too doubtful.")
    ]
    lines: list[Line]
    annotated: NotRequired[
        Annotated[str, Meta(pattern="^data:image/jpeg;base64,", description="The picture with what was read drawn in.")]
    ]


class Layer(TypedDict):
    name: str
    shape: Annotated[list[int], Meta(description="[channels, height, width], or [features]")]
    largest: Annotated[float, Meta(description="The activation that is 255.")]
    values: Annotated[
        str,
        Meta(
            description="A byte an activation, in the order of `shape`.",
            extra_json_schema={"contentEncoding": "base64"},
        ),
    ]


class Explanation(Digit):
    about: Annotated[Class, Meta(description="The digit that is explained.")]
    gradient: Annotated[
        Grid[float], Meta(description="Change of the log-odds of `about` for more ink, a pixel's whole range.")
    ]
    occlusion: Annotated[
        Grid[float],
        Meta(description="Log-odds of `about` that are lost when the 5 x 5 pixels around are covered with paper."),
    ]
    layers: Annotated[list[Layer], Meta(description="Of an ensemble, those of its first member.")]


class Mistake(Digit):
    index: Annotated[int, Meta(description="In the test split.")]
    label: Class


class Mistakes(TypedDict):
    examples: int
    errors: int
    unanswered: Annotated[int, Meta(description="Test examples, read right or wrong, that are too doubtful to answer.")]
    doubtful: Annotated[int, Meta(description="Of the errors, listed or not, those that are too doubtful to answer.")]
    mistakes: Annotated[list[Mistake], Meta(description=f"The most confident first, {MOST_MISTAKES} at most.")]


class Run(TypedDict):
    name: str
    dataset: str
    members: Annotated[int, Meta(ge=1, description="Networks whose probabilities are averaged.")]
    parameters: int
    test_accuracy: float | None
    threshold: Annotated[Share, Meta(description="Least probability of an answer.")]


class Health(TypedDict):
    status: Literal["ok"]


class Problem(TypedDict):
    error: str
