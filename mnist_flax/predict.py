"""Reads digits from images: `python -m mnist_flax.predict RUN FILE... [--layout=digit|line|page]`.

FILE is an image, a directory of images, or `-` for a list of names on standard input.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from mnist_flax import cli

_LAYOUT = flags.DEFINE_enum(
    "layout", "digit", ["digit", "line", "page"], "one digit an image, one line of numbers, or a page of lines."
)
_JSON = flags.DEFINE_bool("json", False, "print a JSON object a line for each image, instead of text.")
_ANNOTATE = flags.DEFINE_string("annotate", None, "directory for copies of the images with the answers drawn in.")
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    None,
    "least probability of an answer, below which it is '?'; by default what calibration on validation data gives.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["last", "best"], "which checkpoint; by default the one that the run's config selects."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where the dataset is, if it moved since the run.")

DEFAULT_THRESHOLD = 0.9  # where a run cannot be calibrated
_SPANS_AT_ONCE, _FILES_AT_ONCE = 1_000, 64  # a batch of images is read once it has as many of either


def main(argv: list[str]) -> int:
    if len(argv) < 3:
        raise cli.UserError("name a run directory and images: python -m mnist_flax.predict RUN FILE...")
    from mnist_flax import reading

    reading.require_packages()
    recogniser, threshold = load(argv[1])
    directory = Path(_ANNOTATE.value) if _ANNOTATE.value else None
    if directory:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cli.UserError(f"--annotate={directory} cannot be written ({error.strerror}): use another") from error

    failed = False
    pending: list[tuple[str, reading.Sheet]] = []

    def flush() -> None:
        results = reading.recognise([sheet for _, sheet in pending], recogniser, threshold)
        for (name, _), result in zip(pending, results, strict=True):
            show(name, result)
        pending.clear()
    ...
