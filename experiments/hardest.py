"""The test images that most runs read wrong: `python -m experiments.hardest RUN... [--output=DIR]`.

Draws them with label and votes, the most often wrong first, and writes the same beside the figure as JSON. Runs may be
seeds of a recipe, other recipes, or both. Labels of MNIST's test split that people found wrong are marked: all fifteen
that Northcutt, Athalye and Mueller validated ("Pervasive label errors in test sets destabilize machine learning
benchmarks", arXiv:2103.14749), where no majority of five people confirmed the label.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from mnist_flax.evaluation.figures import BLUE, GREY, VERMILION, styled
from mnist_flax.experiments.research import outputs
from mnist_flax.inference import model_flags
from mnist_flax.runtime import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OUTPUT = flags.DEFINE_string("output", ".", "directory to write hardest.png and hardest.json to.")
_MOST = flags.DEFINE_integer("most", 30, "how many images at most.", lower_bound=1)


class LabelError(NamedTuple):
    """A label of MNIST's test split that people did not confirm, and how five of them voted."""

    number: int  # in the original archive, from 0
    guess: int  # the other digit that they were offered
    for_label: int
    for_guess: int
    for_neither: int


# From mturk/mnist_mturk.json of github.com/cleanlab/label-errors: each entry with at most two votes for the label. By
# the first 16 digits of the SHA-256 of the image's 784 bytes, since TFDS has the images in another order.
LABEL_ERRORS = {
    "9e571df431674b22": LabelError(947, 9, 0, 5, 0),
    "a6dbd7572d6b5235": LabelError(1621, 6, 2, 3, 0),
    "ac85fc88d75848d8": LabelError(1901, 4, 2, 3, 0),
    "3b659aa46e7e60f0": LabelError(2130, 9, 2, 2, 1),
    "b79f052864e49eef": LabelError(2462, 0, 0, 4, 1),
    "a8b3e479c863b2ec": LabelError(2597, 3, 0, 4, 1),
    "2d23b44093568126": LabelError(2654, 1, 0, 2, 3),
    "78b0ae6da7b031aa": LabelError(3520, 4, 2, 0, 3),
    "2ade8bec31ce7dba": LabelError(3558, 0, 1, 4, 0),
    "ae0606c84402b2d7": LabelError(5937, 3, 1, 3, 1),
    "e58ee418a2c482c9": LabelError(6651, 6, 0, 5, 0),
    "848efc6d40483e6f": LabelError(6783, 6, 2, 3, 0),
    "b147b498facaa9a7": LabelError(8527, 9, 2, 2, 1),
    "6d535e9edb86d534": LabelError(9679, 3, 2, 0, 3),
    "142caf3509596eb9": LabelError(9729, 6, 2, 3, 0),
}


class Hard(NamedTuple):
    """A test image that most runs read wrong."""

    number: int  # in the test split
    label: int
    votes: dict[int, int]  # runs by the class that they read, most first
    label_error: LabelError | None
    image: UInt8[np.ndarray, "28 28"]


def find(
    images: UInt8[np.ndarray, "examples 28 28"],
    labels: Int[np.ndarray, " examples"],
    predictions: Int[np.ndarray, "runs examples"],
) -> list[Hard]:
    """The images that more than half of the runs read wrong, the most often wrong first, then in their order."""
    wrong = (predictions != labels).sum(axis=0)
    hard = np.flatnonzero(2 * wrong > len(predictions))
    found = []
    for i in hard[np.argsort(-wrong[hard], kind="stable")]:
        counts = np.bincount(predictions[:, i])
        votes = {int(k): int(counts[k]) for k in np.argsort(-counts, kind="stable") if counts[k]}
        digest = hashlib.sha256(images[i].tobytes()).hexdigest()[:16]
        found.append(Hard(int(i), int(labels[i]), votes, LABEL_ERRORS.get(digest), images[i]))
    return found


@styled
def figure_hardest(hard: Sequence[Hard], total: int, runs: int, class_names: Sequence[str]) -> "Figure":
    """Images with label, number and votes; `total` is how many there were to choose from."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    long_names = max(map(len, class_names)) > 4
    columns, side, step, between = (4, 1.4, 2.35, "\n") if long_names else (5, 1.2, 1.85, ", ")
    width, height = 7.4, 1.1 + step * max(1, -(-len(hard) // columns))
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    which = f"{total:,}" if len(hard) == total else f"{len(hard)} of {total:,}"
    title = f"Test images read wrong by {readers(runs)}: {which if total else 'none'}"
    axes.text(0.1, 0.2, title, va="center", weight="bold", size=12)
    if any(item.label_error for item in hard):
        note = "In blue: known label errors, and what five people said (? is neither of two digits)"
        axes.text(0.1, 0.48, note, va="center", color=BLUE, size=9.5)
    for place, item in enumerate(hard):
        left = (place % columns) * width / columns + (width / columns - side) / 2
        top = 1.0 + place // columns * step
        colour = BLUE if item.label_error else "#D0D3D8"
        axes.imshow(item.image, cmap="gray_r", vmin=0, vmax=255, extent=(left, left + side, top + side, top))
        axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=1.5))
        axes.text(left, top - 0.06, class_names[item.label], weight="bold", size=9.5 if long_names else 11)
        axes.text(left + side, top - 0.06, f"#{item.number}", ha="right", color=GREY, size=8)
        read = between.join(f"{class_names[k]} x{n}" for k, n in list(item.votes.items())[:3])
        axes.text(left + side / 2, top + side + 0.06, read, ha="center", va="top", color=VERMILION, size=9)
        if item.label_error:
            axes.text(
                left + side / 2, top + side + 0.24, f"people: {people(item)}", ha="center", va="top", color=BLUE, size=8
            )
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def readers(runs: int) -> str:
    """Who reads an image of `find` wrong."""
    return "the run" if runs == 1 else f"most of {runs} runs"


def people(item: Hard) -> str:
    """How people voted on the label: for it, for another digit, for neither ("?")."""
    if (error := item.label_error) is None:
        return ""
    votes = ((f"{item.label}", error.for_label), (f"{error.guess}", error.for_guess), ("?", error.for_neither))
    return ", ".join(f"{name} x{count}" for name, count in votes if count)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise cli.UserError("name finished run directories: python -m experiments.hardest RUN...")
    from mnist_flax.data import datasets as data
    from mnist_flax.inference.predictor import make_logits
    from mnist_flax.runtime import devices, run_dir, terminal

    run_dir.distinct(argv[1:])
    figure, details = outputs.check_directory("output", Path(_OUTPUT.value), "hardest.png", "hardest.json")
    devices.keep_compiled_programs()
    runs = [model_flags.load(directory) for directory in argv[1:]]
    if len(datasets := {trained.config.dataset for trained in runs}) > 1:
        raise cli.UserError(f"these runs are of different datasets ({', '.join(sorted(datasets))}): name runs of one")
    test = data.load(runs[0].config).test
    predictions = [make_logits(trained)(test.images).argmax(axis=1) for trained in runs]
    hard = find(test.images, test.labels, np.array(predictions))
    shown = hard[: _MOST.value]

    figure_hardest(shown, len(hard), len(predictions), runs[0].class_names).savefig(figure, format="png")
    written = [
        {
            "number": item.number,
            "label": item.label,
            "votes": item.votes,
            "label_error": item.label_error and item.label_error._asdict(),
        }
        for item in hard
    ]
    run_dir.write_json(details, {"runs": argv[1:], "dataset": runs[0].config.dataset, "hardest": written})
    table = terminal.table("number", "label", "read as", "people", title=f"Read wrong by {readers(len(runs))}")
    for item in shown:
        read = ", ".join(f"{runs[0].class_names[k]} x{count}" for k, count in item.votes.items())
        table.add_row(f"{item.number}", runs[0].class_names[item.label], read, people(item))
    terminal.console.print(table)
    known = sum(item.label_error is not None for item in hard)
    print(f"{len(hard)} test images are read wrong by {readers(len(runs))}, {known} of them known label errors")
    print(f"written: {figure.resolve()} and {details.resolve()}")


if __name__ == "__main__":
    cli.run(main)
