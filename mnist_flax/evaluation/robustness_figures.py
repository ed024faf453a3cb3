"""Figures of what `robustness` measures, as pure functions of its results; in the style of `figures`."""

from __future__ import annotations  # matplotlib's types without its import

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from mnist_flax.evaluation import corruptions
from mnist_flax.evaluation.corruptions import FAMILIES, SEVERITIES
from mnist_flax.evaluation.figures import BLUE, GREY, VERMILION, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = [name.replace("_", " ") for name in FAMILIES]


def draw(results: Mapping[str, Any], images: UInt8[np.ndarray, "images 28 28"]) -> dict[str, Figure]:
    """Every figure, by the name of its file; `results` as `robustness.summarize` gives them."""
    return {
        "corruptions": figure_corruptions(images),
        "corrupted_accuracy": figure_corrupted_accuracy(results),
        "affine": figure_affine(results["affine"]),
        "calibration": figure_calibration(results["calibration"]),
        "risk_coverage": figure_risk_coverage(results["risk_coverage"]),
    }


def _mark_published(axes: Axes) -> None:
    from matplotlib.patches import Rectangle

    for row, family in enumerate(FAMILIES.values()):
        place = family.published - 1.5, row - 0.5
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=BLUE, linewidth=2, zorder=3, clip_on=False))


def _table_axes(axes: Axes, rows: Sequence[str], left: float = 0.0) -> None:
    """Rows and columns as in a table, the severities above."""
    axes.set_xticks(range(len(SEVERITIES)), [str(severity) for severity in SEVERITIES])
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("severity; the published set's is framed")
    axes.set(xlim=(left - 0.55, len(SEVERITIES) - 0.45), ylim=(len(rows) - 0.45, -0.55))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@styled
def figure_corruptions(images: UInt8[np.ndarray, "images 28 28"]) -> Figure:
    """What the corruptions look like: an image as it is and at each severity, another image for each family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 12.4), layout="compressed")  # axes keep their shape, and labels their place beside
    axes = figure.subplots()
    for row, name in enumerate(FAMILIES):
        number = np.array([row % len(images)])
        image = images[number]
        shown = [image, *(corruptions.corrupt(image, name, severity, number) for severity in SEVERITIES)]
        for column, picture in zip((-1.15, *range(len(SEVERITIES))), shown, strict=True):
            box = (column - 0.46, column + 0.46, row + 0.46, row - 0.46)
            axes.imshow(picture[0], cmap="gray_r", vmin=0, vmax=255, extent=box)
    _table_axes(axes, _NAMES, left=-1.15)
    _mark_published(axes)
    axes.set_xticks([-1.15, *range(len(SEVERITIES))], ["clean", *map(str, SEVERITIES)])
    axes.set_aspect("equal")
    return figure


@styled
def figure_corrupted_accuracy(results: Mapping[str, Any]) -> Figure:
    """Accuracy in percent by corruption and severity, darker where more is read wrong."""
    from matplotlib.figure import Figure

    accuracy = 100 * np.array([row["accuracy"] for row in results["corruptions"].values()])
    figure = Figure(figsize=(6.2, 7.4))
    axes = figure.subplots()
    axes.imshow(np.sqrt(100 - accuracy), cmap="Oranges", vmin=0, vmax=16, aspect="auto")
    for (row, column), share in np.ndenumerate(accuracy):
        axes.text(column, row, f"{share:.1f}", ha="center", va="center", color="#111111")
    for column, share in enumerate(accuracy.mean(axis=0)):
        axes.text(column, len(accuracy), f"{share:.1f}", ha="center", va="center", weight="bold")
    _table_axes(axes, [*_NAMES, "mean"])
    _mark_published(axes)
    clean, mean = (100 * results[name] for name in ("clean_accuracy", "corrupted_accuracy"))
    axes.set_title(f"Accuracy {mean:.2f} % corrupted, {clean:.2f} % clean", pad=14)
    return figure


@styled
def figure_affine(affine: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Accuracy against rotation, scale and shift."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 7.2))
    panels = {
        "Rotation (degrees, clockwise)": {"": "rotation"},
        "Scale (1 is as it was)": {"": "scale"},
        "Shift (pixels)": {"right": "shift_right", "down": "shift_down"},
    }
    for axes, (title, curves) in zip(figure.subplots(3, 1, sharey=True), panels.items(), strict=True):
        for (label, name), colour, marker in zip(curves.items(), (BLUE, VERMILION), "os", strict=False):
            values, shares = affine[name]["values"], 100 * np.array(affine[name]["accuracy"])
            axes.plot(values, shares, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
            axes.set_xticks(values)
        if len(curves) > 1:
            axes.legend(frameon=False, loc="lower center")
        axes.set_title(title)
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 102)
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.grid(True, axis="y")
    return figure


@styled
def figure_calibration(calibration: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Accuracy against confidence, clean and corrupted, without and, where it was fitted, with temperature scaling.

    Bins of fewer than ten examples are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.9))
    for axes, (name, parts) in zip(figure.subplots(1, 2, sharey=True), calibration.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
        names = ("unscaled", "temperature scaled")
        for part, way, colour, marker in zip(parts.values(), names, (VERMILION, BLUE), "os", strict=False):
            points = part["reliability"]
            error = 100 * part["expected_calibration_error"]
            full = np.array(points["count"]) >= 10
            confidence, accuracy = (np.array(points[key], float)[full] for key in ("confidence", "accuracy"))
            label = f"{way}: {error:.2f} %"
            axes.plot(confidence, accuracy, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
        axes.legend(title="expected calibration error", fontsize=9, title_fontsize=9, frameon=False, loc="upper left")
        axes.set_title(f"{name} examples")
        axes.set_xlabel("confidence")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.35), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
        axes.set_ylabel("accuracy" if name == "clean" else "")
        axes.xaxis.set_major_formatter("{x:g}")  # 1.0 would touch the 0.0 beside it
        axes.grid(True, axis="y")
    return figure


@styled
def figure_risk_coverage(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Error rate among the answered examples against their share, beside the best that an order could give."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.6))
    for axes, (name, curve) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        coverage, risk = (100 * np.array(curve[key]) for key in ("coverage", "risk"))
        best = np.maximum(coverage - (100 - risk[-1]), 0) / coverage * 100
        axes.plot(coverage, risk, color=BLUE, linewidth=1.8, label=f"area {100 * curve['area']:.3f} %")
        label = f"all errors last: {100 * curve['least_area']:.3f} %"
        axes.plot(coverage, best, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
        axes.legend(fontsize=9, frameon=False, loc="upper left")
        axes.set_title(f"{name} examples")
        axes.set_xlabel("coverage: share answered")
        axes.set_ylabel("risk: share of those wrong" if name == "clean" else "")
        axes.set(xlim=(0, 101), ylim=(0, max(risk.max() * 1.25, 1e-3)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g} %")
        axes.grid(True, axis="y")
    return figure
