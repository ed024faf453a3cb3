"""The report of a finished run: its figures, and one page that needs no other file.

The page's content policy forbids the browser to fetch anything.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import ArrayLike

from mnist_flax.evaluation import figures, html, metrics
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import files, metrics_log, run_dir
from mnist_flax.runtime.settings import pinned
from mnist_flax.runtime.terminal import percent, plain, shown

CAPTIONS = {
    "learning_curves": "How training went. Training values are means over each epoch with dropout and augmentation "
    "as configured; validation comes after the epoch, without them, so it can be the better of the two.",
    "confusion_matrix": "What each label was read as. Mistakes are coloured, darker where there are more; "
    "recall is the share of a label's examples that were found.",
    "filters": "The weights of the first layer (in an ensemble, of its first member): each filter answers to strokes "
    "that are bright where it is purple and dark where it is orange.",
    "mistakes": "The mistakes that the model was surest of: the label in bold, the number of the example in the "
    "test split, what the model read and with which probability.",
    "reliability": "Can the probabilities be trusted? Of the examples read with a given confidence, how many were "
    "read right. Wide intervals mean few examples.",
}
# Drawn by `evaluate --corruptions`, and on the page where they are.
ROBUSTNESS_CAPTIONS = {
    "corrupted_accuracy": "Accuracy in percent under the corruptions of MNIST-C, none of which the model was trained "
    "for. The severity of the published set is framed.",
    "corruptions": "What those corruptions look like.",
    "affine": "Accuracy on digits that were turned, scaled or shifted.",
    "calibration": "Confidence and accuracy without temperature scaling, and with it where there are validation "
    "examples to fit it to: on the clean examples, and on the fifteen published corruptions together.",
    "risk_coverage": "If only the most confident examples are answered: how many of the answers are wrong.",
}


@pinned()
def draw(
    directory: Path,
    images: UInt8[np.ndarray, "examples height width"],
    labels: Int[np.ndarray, " examples"],
    logits: Float[np.ndarray, "examples classes"],
    kernel: ArrayLike,
    class_names: Sequence[str],
) -> dict[str, bytes]:
    """Writes `figures/*.png` into a run directory, from the test split's logits; gives all that a report shows.

    `kernel` is that of the first layer, [height, width, 1, channels]. An ensemble has no learning curves.

    Raises:
      UserError: the directory's metrics.jsonl or config.json cannot be read.
    """
    scores = metrics.evaluate_logits(logits, labels)
    curves = {}
    if "members" not in run_dir.read_json(directory / "config.json"):
        curves["learning_curves"] = figures.figure_learning_curves(
            metrics_log.read_records(directory / "metrics.jsonl")
        )
    drawn = curves | {
        "confusion_matrix": figures.figure_confusion(np.array(scores["confusion"]), class_names),
        "filters": figures.figure_filters(np.asarray(kernel)),
        "mistakes": figures.figure_mistakes(images, labels, logits, class_names),
        "reliability": figures.figure_reliability(metrics.reliability_bins(logits, labels)),
    }
    pictures = save_figures(directory, drawn)
    for name in ROBUSTNESS_CAPTIONS:
        if (path := directory / run_dir.FIGURES / f"{name}.png").exists():
            pictures[name] = path.read_bytes()
    return pictures


def write(
    directory: Path,
    summary: Mapping[str, Any],
    scores: Mapping[str, Any],
    class_names: Sequence[str],
    pictures: Mapping[str, bytes],
) -> Path:
    """Writes `report.html` into a run directory. `scores` are the test split's, of `metrics.evaluate_logits`.

    Raises:
      UserError: the directory's config.json cannot be read.
    """
    path = directory / "report.html"
    recorded = run_dir.read_json(directory / "config.json")
    text = page(directory.name, summary, scores, class_names, recorded, pictures)
    files.write(path, text.encode(errors="backslashreplace"))  # a directory's name may be any bytes
    return path


def save_figures(directory: Path, drawn: Mapping[str, Any]) -> dict[str, bytes]:
    """Writes `figures/NAME.png` in a directory for each figure; gives the files' contents by name."""
    (directory / run_dir.FIGURES).mkdir(exist_ok=True)
    pictures = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pictures[name] = buffer.getvalue()
        files.write(directory / run_dir.FIGURES / f"{name}.png", pictures[name])
    return pictures


def page(
    name: str,
    summary: Mapping[str, Any],
    scores: Mapping[str, Any],
    class_names: Sequence[str],
    recorded: Mapping[str, Any],
    pictures: Mapping[str, bytes],
) -> str:
    """The report as HTML. `recorded` is config.json; `pictures` are PNG files by the names of their captions."""
    low, high = map(percent, scores["accuracy_interval"])
    interval = f"{low.removesuffix(' %')} to {high}".replace(" ", "\u00a0")
    heading = f"{percent(scores['accuracy'])} right on the {summary.get('dataset', 'unknown')} test set"
    tiles = [
        ("test accuracy", percent(scores["accuracy"]), f"95 % interval {interval}"),
        ("mistakes", f"{scores['errors']:,}", f"of {scores['examples']:,} test examples"),
        ("loss", f"{scores['negative_log_likelihood']:.4f}", "negative log-likelihood"),
        ("calibration error", percent(scores["expected_calibration_error"]), "expected, 15 bins"),
        ("parameters", shown("parameters", summary.get("parameters")), "trained"),
        ("training", shown("train_seconds", summary.get("train_seconds")), str(summary.get("device", ""))),
    ]
    classes = [
        (class_names[row["class"]], f"{row['examples']:,}", percent(row["precision"]), percent(row["recall"]))
        for row in scores["per_class"]
    ]
    members = [
        (Path(member["path"]).name, str(member["seed"]), percent(member["test_accuracy"]))
        for member in recorded.get("members", [])
    ]
    settings = [
        (key.removeprefix("config."), plain(value))
        for key, value in config_lib.flatten(recorded).items()
        if key != "members"
    ]
    return html.render(
        html.TEMPLATES / "run.html.jinja",
        name=name,
        heading=heading,
        tiles=tiles,
        pictures=pictures,
        captions=CAPTIONS | ROBUSTNESS_CAPTIONS,
        classes=classes,
        summary=[(key.replace("_", " "), shown(key, value)) for key, value in summary.items()],
        members=members,
        settings=settings,
    )
