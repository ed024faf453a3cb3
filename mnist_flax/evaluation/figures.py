"""Figures of one run, as pure functions of plain arrays. matplotlib's object interface, imported when drawing.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and no figure relies on colour
alone. Wrong predictions and gaps are always vermilion.
"""

from __future__ import annotations  # matplotlib's types without its import

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from mnist_flax.evaluation import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#5F6368"

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#E3E5E8",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.dpi": 160,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in `STYLE`, whatever the reader's own matplotlib settings are."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return wrapper


@styled
def figure_learning_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, error rate and learning rate by epoch, from the records of metrics.jsonl."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.2, 7))
    loss, error, rate = figure.subplots(3, 1, sharex=True, height_ratios=(5, 5, 2))
    train, validation = (
        [record for record in records if record["split"] == split] for split in ("train", "validation")
    )
    last_epoch = max(record["epoch"] for record in records)
    curves = ("train", train, GREY, "o"), ("validation", validation, BLUE, "s")
    drawn = [curve for curve in curves if curve[1]]
    for axes, value, form, tick in (
        (loss, lambda row: row["loss"], "{:.4f}", "{x:g}"),
        (error, lambda row: 100 * (1 - row["accuracy"]), "{:.2f} %", "{x:g} %"),
    ):
        for _, rows, colour, marker in drawn:
            x, y = [row["epoch"] for row in rows], [value(row) for row in rows]
            axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.8)
        _log_axis(axes, tick)
        ends = [(rows[-1]["epoch"], value(rows[-1])) for _, rows, _, _ in drawn]
        for (split, _, colour, _), end, lift in zip(drawn, ends, _lifts(axes, ends), strict=True):
            axes.annotate(
                f"{split}\n{form.format(end[1])}",
                end,
                (9, lift),
                textcoords="offset points",
                color=colour,
                va="center",
                annotation_clip=False,
            )
    if validation:
        best = max(validation, key=lambda row: row["accuracy"])
        place = best["epoch"], 100 * (1 - best["accuracy"])
        error.plot(*place, "o", markersize=13, fillstyle="none", color=VERMILION, mew=1.6, clip_on=False)
        found = f"lowest validation error: {place[1]:.2f} %, epoch {place[0]}"
        error.set_title(found, loc="right", color=VERMILION, fontsize=9, weight="normal")
    rate.plot([row["epoch"] for row in train], [row["learning_rate"] for row in train], color=GREY, marker=".")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.set_xlabel("epoch")
    margin = 0.02 * last_epoch if last_epoch > 1 else 0.5
    rate.set_xlim(1 - margin, last_epoch + margin)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    loss.set_title("train: mean over the epoch, as trained", loc="right", color=GREY, fontsize=9, weight="normal")
    for axes, title in ((loss, "Loss (cross-entropy)"), (error, "Error rate"), (rate, "Learning rate")):
        axes.set_title(title)
        axes.grid(True, axis="y")
    return figure


def _lifts(axes: Axes, ends: Sequence[tuple[float, float]]) -> list[float]:
    """How far, in points, to lift the labels of one or two curves' ends so that they are 30 apart at least."""
    heights = axes.transData.transform(ends)[:, 1] * 72 / axes.figure.dpi
    if len(heights) == 1:
        return [0.0]
    gap = heights[0] - heights[1]
    lift = max(0.0, 30 - abs(gap)) / 2 * (1 if gap >= 0 else -1)
    return [lift, -lift]


def _log_axis(axes: Axes, form: str) -> None:
    """A logarithmic y axis with plain numbers, which also has a place for an exact 0 when there is one."""
    from matplotlib.ticker import FixedLocator, NullLocator

    values = np.concatenate([line.get_ydata() for line in axes.lines]).astype(float)
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 200 else (1, 3) if high / low < 2_000 else (1,)
    ticks = np.outer(decades, steps).ravel()
    bottom = max(ticks[ticks < low * 0.75])
    if (values <= 0).any():
        axes.set_yscale("symlog", linthresh=bottom, linscale=0.3)
        axes.set_ylim(-bottom / 2, high * 1.3)
        ticks = np.append(0, ticks)
    else:
        axes.set_yscale("log")
        axes.set_ylim(bottom, high * 1.3)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick == 0 or bottom <= tick <= high * 1.3]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(form)


@styled
def figure_confusion(confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> Figure:
    """How often each label (row) was read as each class (column); the mistakes stand out, not the diagonal."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    classes = len(confusion)
    mistakes = confusion - np.diag(np.diag(confusion))
    _, recall = metrics.precision_and_recall(confusion)
    figure = Figure(figsize=(6.6, 6.3))
    axes = figure.subplots()
    # Square-root shades: a single mistake is visible beside the most frequent confusion.
    shades = np.sqrt(mistakes / max(mistakes.max(), 5))
    axes.imshow(np.where(mistakes > 0, shades, np.nan), cmap="Oranges", vmin=0, vmax=1.6)
    for i in range(classes):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, color="#DDE3EA"))
        for j in range(classes):
            if confusion[i, j]:
                bold = "bold" if i != j else "normal"
                axes.text(j, i, f"{confusion[i, j]}", ha="center", va="center", color="#111111", weight=bold)
        found = "none" if np.isnan(recall[i]) else f"{100 * recall[i]:.1f} %"
        axes.text(classes - 0.3, i, found, va="center", color=GREY)
    axes.text(classes - 0.3, -0.75, "recall", color=GREY)
    long_names = max(map(len, class_names)) > 4
    axes.set_xticks(
        range(classes), class_names, rotation=45 if long_names else 0, ha="right" if long_names else "center"
    )
    axes.set_yticks(range(classes), class_names)
    axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.grid(True, which="minor", color="#EEEEEE")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("read as")
    axes.set_ylabel("label")
    examples, errors = confusion.sum(), mistakes.sum()
    axes.set_title(f"{errors:,} of {examples:,} wrong ({100 * errors / examples:.2f} %)", pad=24)
    return figure


@styled
def figure_mistakes(
    images: UInt8[np.ndarray, "examples height width"],
    labels: Int[np.ndarray, " examples"],
    logits: Float[np.ndarray, "examples classes"],
    class_names: Sequence[str],
) -> Figure:
    """The thirty mistakes that the model was surest of: label, number in the split, prediction and its probability."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    probabilities = np.exp(metrics.log_softmax(logits))
    predictions, confidence = logits.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:30]
    if len(shown) < len(wrong):
        title = f"Mistakes: the {len(shown)} most confident of {len(wrong):,}"
    else:
        title = f"Mistakes: all {len(wrong)}" if len(wrong) else "Mistakes: none"
    # One frame measured in inches: laying out thirty takes matplotlib seconds.
    long_names = max(map(len, class_names)) > 4
    columns, side, step, line = (4, 1.4, 2.1, "\n") if long_names else (5, 1.12, 1.68, " ")
    width, height = 6.2, 0.75 + step * max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(0.08, 0.2, title, va="center", weight="bold", size=12)
    if not len(shown):
        axes.text(width / 2, height / 2, f"No mistake among {len(labels):,} examples.", ha="center", color=GREY)
    for place, i in enumerate(shown):
        left = (place % columns) * width / columns + (width / columns - side) / 2
        top = 0.7 + place // columns * step
        box = (left, left + side, top + side, top)
        axes.imshow(images[i], cmap="gray_r", vmin=0, vmax=255, extent=box)
        axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="#D0D3D8"))
        axes.text(left, top - 0.06, class_names[labels[i]], weight="bold", size=9.5 if long_names else 11)
        axes.text(left + side, top - 0.06, f"#{i}", ha="right", color=GREY, size=8)
        read = f"read {class_names[predictions[i]]},{line}{100 * confidence[i]:.0f} %"
        axes.text(left + side / 2, top + side + 0.07, read, ha="center", va="top", color=VERMILION, size=10.5)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


@styled
def figure_filters(kernel: Float[np.ndarray, "height width 1 channels"]) -> Figure:
    """The filters of the first layer, strongest first, on one scale around zero."""
    import matplotlib
    from matplotlib.figure import Figure

    filters = np.asarray(kernel, np.float64)[:, :, 0].transpose(2, 0, 1)
    filters = filters[np.argsort(-np.linalg.norm(filters, axis=(1, 2)), kind="stable")]
    count, (height, width) = len(filters), filters.shape[1:]
    columns = min(count, 8 if count <= 64 else 16)
    rows = -(-count // columns)
    bound = np.abs(filters).max() or 1.0
    # One picture of all filters with a blank pixel between them: quick to draw at any count.
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, values in enumerate(filters):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = values
    figure = Figure(figsize=(6.2, 4.9 * rows * (height + 1) / (columns * (width + 1)) + 1))
    axes = figure.subplots()
    colours = matplotlib.colormaps["PuOr"].with_extremes(bad="#BEC3CA")
    picture = axes.imshow(sheet, cmap=colours, vmin=-bound, vmax=bound, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{count} filters of {height} x {width}, strongest first")
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.9, pad=0.02).outline.set_visible(False)
    return figure


@styled
def figure_reliability(bins: Mapping[str, np.ndarray]) -> Figure:
    """Accuracy against confidence in bins, with the gap and its uncertainty, over the number of examples.

    `bins` as `metrics.reliability_bins` gives them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 6.4))
    diagram, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    full = bins["count"] > 0
    lower, upper, count, confidence, accuracy = (
        np.asarray(bins[name])[full] for name in ("lower", "upper", "count", "confidence", "accuracy")
    )
    centre, width = (lower + upper) / 2, (upper - lower) * 0.94
    diagram.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    along = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    diagram.text(0.03, 0.045, "perfectly calibrated", color=GREY, **along)
    diagram.bar(centre, accuracy, width, color=BLUE, alpha=0.75, label="accuracy")
    diagram.bar(
        centre,
        confidence - accuracy,
        width,
        bottom=accuracy,
        facecolor="none",
        edgecolor=VERMILION,
        hatch="////",
        linewidth=1.2,
        label="gap to the mean confidence",
    )
    intervals = [metrics.wilson_interval(round(a * n), int(n)) for a, n in zip(accuracy, count, strict=True)]
    reach = np.abs(np.array(intervals).reshape(-1, 2).T - accuracy)
    diagram.errorbar(
        centre, accuracy, reach, fmt="none", ecolor="#111111", elinewidth=1.2, capsize=3, label="95 % interval"
    )
    diagram.set_ylim(0, 1.02)
    diagram.set_ylabel("accuracy")
    diagram.set_title(f"Expected calibration error {100 * metrics.calibration_error(dict(bins)):.2f} %", pad=28)
    # Above the diagram: bars may stand anywhere in it.
    diagram.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=9.5, frameon=False)
    histogram.bar(centre, count, width, color=GREY)
    histogram.set_yscale("log")
    histogram.set_ylim(0.7, count.max() * 6)
    for x, n in zip(centre, count, strict=True):
        histogram.annotate(f"{n}", (x, n), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    histogram.set_ylabel("examples")
    histogram.set_xlabel("confidence: probability of the prediction")
    histogram.set_xlim(0, 1)
    for axes in (diagram, histogram):
        axes.grid(True, axis="y")
    return figure
