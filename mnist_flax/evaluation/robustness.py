"""How a model fares away from its training data: `python -m mnist_flax.evaluate RUN --corruptions`.

Accuracy under the corruptions of MNIST-C and under rotation, scale and shift; whether its probabilities can be
trusted there, before and after temperature scaling; and how many errors are avoided by leaving the least confident
examples unanswered. Everything goes through one function from images to logits.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mnist_flax.data.datasets import Split
from mnist_flax.evaluation import corruptions, metrics
from mnist_flax.evaluation.corruptions import FAMILIES, SEVERITIES


class Direction(NamedTuple):
    """One way of moving digits: by how much, and the matrix and shift of `corruptions.affine` for it."""

    values: tuple[float, ...]
    inverse: Callable[[float], tuple[np.ndarray, np.ndarray]]


AFFINE: Mapping[str, Direction] = {
    "rotation": Direction(tuple(range(-90, 91, 15)), lambda x: (corruptions.rotation(np.deg2rad(x)), np.zeros(2))),
    "scale": Direction(tuple(i / 10 for i in range(5, 16)), lambda x: (np.eye(2) / x, np.zeros(2))),
    "shift_right": Direction(tuple(range(-8, 9, 2)), lambda x: (np.eye(2), np.array([0.0, -x]))),
    "shift_down": Direction(tuple(range(-8, 9, 2)), lambda x: (np.eye(2), np.array([-x, 0.0]))),
}
_AT_ONCE = 2048  # images that are corrupted and read together

Images = UInt8[np.ndarray, "images 28 28"]
LogitsOf = Callable[[Images], Float[np.ndarray, "images classes"]]


class Measurement(NamedTuple):
    """What a model makes of a split and its variants; logits are [examples, classes]."""

    clean: np.ndarray
    published: dict[str, np.ndarray]  # logits by family, at the severity of the published set
    corrupted: dict[str, list[float]]  # accuracies by family, one a severity
    affine: dict[str, list[float]]  # accuracies by direction, one a value


def measure(logits_of: LogitsOf, split: Split) -> Measurement:
    """Reads a split as it is and in every variant; with a progress bar on a terminal.

    `logits_of` takes any number of images.
    """
    from rich.console import Console
    from rich.progress import Progress

    def read(change: Callable[..., Images]) -> np.ndarray:
        parts = np.split(np.arange(len(split.labels)), range(_AT_ONCE, len(split.labels), _AT_ONCE))
        logits = [logits_of(change(split.images[numbers], numbers=numbers)) for numbers in parts]
        progress.advance(task)
        return np.concatenate(logits)

    def moved(images: Images, numbers: np.ndarray, direction: Direction, value: float) -> Images:
        return corruptions.to_bytes(corruptions.affine(images / 255, *direction.inverse(value)))

    def accuracy(logits: np.ndarray) -> float:
        return float((logits.argmax(axis=1) == split.labels).mean())

    variants = 1 + len(FAMILIES) * len(SEVERITIES) + sum(len(direction.values) for direction in AFFINE.values())
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Corrupting", total=variants)
        clean = read(lambda images, numbers: images)
        found = Measurement(clean, {}, {name: [] for name in FAMILIES}, {name: [] for name in AFFINE})
        for name, family in FAMILIES.items():
            for severity in SEVERITIES:
                logits = read(partial(corruptions.corrupt, name=name, severity=severity))
                found.corrupted[name].append(accuracy(logits))
                if severity == family.published:
                    found.published[name] = logits
        for name, direction in AFFINE.items():
            for value in direction.values:
                logits = read(partial(moved, direction=direction, value=value))
                found.affine[name].append(accuracy(logits))
    return found


def summarize(measured: Measurement, labels: metrics.Labels, temperature: float | None) -> dict[str, Any]:
    """What robustness.json holds, less where it is from.

    Accuracies and risks are shares of 1. "corrupted" is about the fifteen sets at the severities of the published
    MNIST-C, all their examples together. Without a `temperature` nothing is said of calibration after scaling.
    """
    pooled = np.concatenate(list(measured.published.values())), np.tile(labels, len(measured.published))
    sets = {"clean": (measured.clean, labels), "corrupted": pooled}
    scales = {"before": 1.0} | ({} if temperature is None else {"after": temperature})
    accuracy = measured.corrupted
    return {
        "examples": len(labels),
        "clean_accuracy": float((measured.clean.argmax(axis=1) == labels).mean()),
        "corrupted_accuracy": float(np.mean([accuracy[name][f.published - 1] for name, f in FAMILIES.items()])),
        "corrupted_accuracy_all_severities": float(np.mean(list(accuracy.values()))),
        "corruptions": {
            name: {"published_severity": family.published, "accuracy": accuracy[name]}
            for name, family in FAMILIES.items()
        },
        "affine": {
            name: {"values": list(direction.values), "accuracy": measured.affine[name]}
            for name, direction in AFFINE.items()
        },
        "temperature": temperature,
        "calibration": {
            name: {when: metrics.evaluate_calibration(logits / scale, truth) for when, scale in scales.items()}
            for name, (logits, truth) in sets.items()
        },
        "risk_coverage": {name: _risk_coverage(*of) for name, of in sets.items()},
    }


def _risk_coverage(logits: metrics.Logits, labels: metrics.Labels) -> dict[str, Any]:
    """The curve at 200 coverages, the area under it, and what that would be with all errors last."""
    risk = metrics.risk_coverage(logits, labels)
    examples = np.arange(1, len(risk) + 1)
    right = (logits.argmax(axis=1) == labels).sum()
    best = np.maximum(examples - right, 0) / examples
    shown = np.unique(np.linspace(0, len(risk) - 1, 200).round().astype(int))
    return {
        "area": float(risk.mean()),
        "least_area": float(best.mean()),
        "coverage": (examples[shown] / len(risk)).tolist(),
        "risk": risk[shown].tolist(),
    }


def print_results(results: Mapping[str, Any]) -> None:
    """Prints what `summarize` found, the published severities marked."""
    from mnist_flax.runtime.terminal import console, table

    title = f"Accuracy under corruption by severity; * is the published MNIST-C ({results['examples']:,} examples)"
    shown = table("corruption", *map(str, SEVERITIES), title=title)
    for name, row in results["corruptions"].items():
        marks = ("*" if severity == row["published_severity"] else " " for severity in SEVERITIES)
        cells = (f"{share:.2%}{mark}" for share, mark in zip(row["accuracy"], marks, strict=True))
        shown.add_row(name.replace("_", " "), *cells)
    console.print(shown)
    console.print(f"clean {results['clean_accuracy']:.2%}")
    console.print(
        f"mean over the corruptions {results['corrupted_accuracy']:.2%} as published, "
        f"{results['corrupted_accuracy_all_severities']:.2%} over all severities"
    )
    for name, row in results["affine"].items():
        shares = (f"{value:g}: {share:.1%}" for value, share in zip(row["values"], row["accuracy"], strict=True))
        console.print(f"{name.replace('_', ' ')}  {', '.join(shares)}")
    for name, row in results["calibration"].items():
        errors = (f"{part['expected_calibration_error']:.4f} {when}" for when, part in row.items())
        area = results["risk_coverage"][name]
        console.print(
            f"{name}: expected calibration error {', '.join(errors)} temperature scaling; "
            f"area under risk and coverage {area['area']:.5f} (at least {area['least_area']:.5f})"
        )
    if results["temperature"] is None:
        console.print("no temperature scaling: no validation examples to fit it to are at hand")
