"""Figures of a study, as pure functions of its trials, in the style of a run's figures."""

from __future__ import annotations  # matplotlib's types without its import

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from mnist_flax.evaluation.figures import BLUE, GREY, VERMILION, styled
from mnist_flax.experiments.research import space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours that are dark enough for points, with a marker each for those who cannot tell them apart. From
# the ninth on, colours come again with the next marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#5F6368")
SERIES = tuple((COLOURS[i % 8], "os^Dv<>P"[(i + i // 8) % 8]) for i in range(64))
FEW = 8  # values of a choice that are drawn side by side, each at its own place


class Trial(NamedTuple):
    """What the figures need of a trial."""

    number: int
    params: Mapping[str, Any]
    outcome: Literal["complete", "stopped", "diverged"]
    value: float  # objective, or what it was compared by when it was stopped; infinite if it diverged
    curve: Sequence[Sequence[float]]  # records: step, epoch, train loss, validation loss and accuracy


class Axis(NamedTuple):
    """How a hyperparameter is drawn: `ticks` are its values where there are few, else it is a number."""

    key: str
    low: float
    high: float
    log: bool
    ticks: tuple

    def place(self, value: Any) -> float:
        return float(self.ticks.index(value)) if self.ticks else float(value)

    def share(self, value: Any) -> float:
        """Where a value is between the ends, 0 to 1."""
        place, low, high = self.place(value), self.low, self.high
        if self.log:
            place, low, high = math.log(place), math.log(low), math.log(high)
        return (place - low) / (high - low) if high > low else 0.5


def make_axis(key: str, dimension: Mapping[str, Any]) -> Axis:
    """The axis of a range as study.json describes it (see `experiments.research.space.Dimension`)."""
    if dimension["kind"] != "choice":
        return Axis(key, dimension["low"], dimension["high"], bool(dimension["log"]), ())
    values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in dimension["values"]]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        values = sorted(values)
        if len(values) > FEW:
            return Axis(key, values[0], values[-1], values[0] > 0 and values[-1] / values[0] > 20, ())
    return Axis(key, 0.0, max(len(values) - 1.0, 0.0), False, tuple(map(space.label, values)))


def short(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def _set_x(axes: Axes, axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.ticks:
        axes.set_xticks(range(len(axis.ticks)), [number(tick) for tick in axis.ticks])
        axes.set_xlim(-0.5, len(axis.ticks) - 0.5)
        if len("".join(map(number, axis.ticks))) > 36:
            axes.tick_params("x", rotation=30)
    elif axis.log:
        axes.set_xscale("log")
        if axis.high < 100 * axis.low:  # where powers of ten are few, matplotlib would write 2 x 10^1 and its like
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(axis.low / 1.25, axis.high * 1.25)
    else:
        margin = 0.05 * (axis.high - axis.low)
        axes.set_xlim(axis.low - margin, axis.high + margin)
    if not axis.ticks:
        for end in (axis.low, axis.high):
            axes.axvline(end, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    axes.set_xlabel(short(axis.key))


def number(value: Any) -> str:
    return f"{value:,g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _set_y(axes: Axes, values: Sequence[float], objective: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _shown(v, objective)))
    axes.grid(True, axis="y")


def _shown(value: float, objective: str) -> str:
    return f"{100 * value:.3g} %" if objective == "validation_error" else f"{value:.3g}"


def _label_y(objective: str) -> str:
    return objective.replace("_", " ")


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials, best first."""
    return sorted((t for t in trials if t.outcome == "complete"), key=lambda t: (t.value, t.number))


def _cap(values: Sequence[float]) -> float:
    """Where the objective's axis ends, so that a few hopeless trials do not flatten the rest: see `_within`."""
    return float(min(max(values), 20 * np.median(values)))


def _within(axes: Axes, points: Sequence[tuple[float, float]], cap: float, objective: str) -> list[float]:
    """Heights of the points as drawn; those above the cap lie at its rim, and get an arrow and their value."""
    rim = 1.15 * cap
    for x, y in points:
        if cap < y < math.inf:
            axes.plot(x, rim, "^", color="#111111", markersize=9, fillstyle="none", clip_on=False)
            axes.annotate(
                _shown(y, objective), (x, rim), (7, 0), textcoords="offset points", va="center", annotation_clip=False
            )
    return [y if y <= cap else rim for _, y in points]


@styled
def figure_isolation(trials: Sequence[Trial], axes_of: Sequence[Axis], objective: str) -> Figure:
    """The objective against each hyperparameter alone; infeasible trials along the top, the best ringed."""
    from matplotlib.figure import Figure

    columns = min(3, len(axes_of))
    rows = -(-len(axes_of) // columns)
    figure = Figure(figsize=(max(6.2, 4.1 * columns), 3.5 * rows + 0.5))
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    complete = ranked(trials)
    best, cap = complete[0], _cap([t.value for t in complete])
    random = np.random.default_rng(0)
    for axes, axis in zip(panels, axes_of, strict=False):
        drawn: dict[int, tuple[float, float]] = {}  # by number of the trial
        for kind, colour, marker, label in (
            ([t for t in trials if t.outcome == "stopped"], GREY, "+", "stopped early"),
            (complete, BLUE, "o", "complete"),
            ([t for t in trials if t.outcome == "diverged"], VERMILION, "x", "infeasible: diverged"),
        ):
            there = [t for t in kind if axis.key in t.params]
            if not kind:
                continue
            jitter = random.uniform(-0.15, 0.15, len(there)) if axis.ticks else np.zeros(len(there))
            x = [axis.place(t.params[axis.key]) + j for t, j in zip(there, jitter, strict=True)]
            y = _within(axes, list(zip(x, (t.value for t in there), strict=True)), cap, objective)
            axes.scatter(x, y, s=26, color=colour, marker=marker, label=label, alpha=0.75, linewidths=1.3)
            drawn |= {t.number: (a, b) for t, a, b in zip(there, x, y, strict=True)}
        if best.number in drawn:
            axes.plot(*drawn[best.number], "o", markersize=13, fillstyle="none", color=VERMILION, mew=1.8, label="best")
        _set_x(axes, axis)
        _set_y(axes, [best.value, cap], objective)
    for axes in panels[len(axes_of) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(_label_y(objective))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False)
    return figure


@styled
def figure_importance(importance: Mapping[str, tuple[float, float]]) -> Figure:
    """Shares of the objective's variance that each hyperparameter explains alone: mean and deviation over forests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 0.5 * len(importance) + 1.3))
    axes = figure.subplots()
    names = list(importance)[::-1]
    means, deviations = np.array([importance[name] for name in names]).reshape(-1, 2).T
    axes.barh(range(len(names)), means, xerr=deviations, color=BLUE, alpha=0.8, ecolor="#111111", capsize=3)
    for i, mean in enumerate(means):
        axes.annotate(f"{100 * mean:.0f} %", (mean + deviations[i], i), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_xlim(min(0, *(means - deviations) * 1.1), max(means + deviations) * 1.2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.set_xlabel("share of the variance explained (fANOVA)")
    return figure


@styled
def figure_parallel(trials: Sequence[Trial], axes_of: Sequence[Axis], objective: str) -> Figure:
    """Every complete trial as a line through its hyperparameters, dark where it is good; the best five in colour."""
    import matplotlib
    from matplotlib.figure import Figure

    complete = ranked(trials)[::-1]
    figure = Figure(figsize=(max(9.6, 1.7 * (len(axes_of) + 1)), 4.6))
    axes = figure.subplots()
    colours = matplotlib.colormaps["Greys"]
    for rank, trial in enumerate(complete):
        x, y = [], []
        for i, axis in enumerate(axes_of):
            x.append(i)
            y.append(axis.share(trial.params[axis.key]) if axis.key in trial.params else math.nan)
        quality = rank / (len(complete) - 1) if len(complete) > 1 else 1.0
        among_best = rank >= len(complete) - 5
        end = ([*x, len(axes_of)], [*y, 1 - quality])
        colour, width = (VERMILION, 2) if among_best else (colours(0.15 + 0.5 * quality), 1)
        axes.plot(*end, color=colour, linewidth=width)
        if among_best:
            axes.plot(*end, "o", color=VERMILION, markersize=4)
    for i, axis in enumerate(axes_of):
        axes.axvline(i, color=GREY, linewidth=1)
        marks = [(axis.share(tick), tick) for tick in axis.ticks] or [(0.0, axis.low), (1.0, axis.high)]
        for share, mark in marks:
            axes.annotate(number(mark), (i, share), (4, 0), textcoords="offset points", size=8.5, color="#222222")
    axes.axvline(len(axes_of), color=GREY, linewidth=1)
    for share, text in ((0.0, "best"), (1.0, "worst")):
        axes.annotate(text, (len(axes_of), share), (4, 0), textcoords="offset points", size=8.5)
    names = [short(axis.key).replace(" ", "\n") for axis in axes_of]
    axes.set_xticks(range(len(names) + 1), [*names, f"rank by\n{_label_y(objective)}"])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.1, len(axes_of) + 0.5)
    return figure


@styled
def figure_curves(trials: Sequence[Trial]) -> Figure:
    """Validation error of the five best trials by epoch, over all others in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.8))
    axes = figure.subplots()
    complete = ranked(trials)
    errors: list[float] = []
    for trial in trials:
        epochs, error = [r[1] for r in trial.curve], [1 - r[4] for r in trial.curve]
        axes.plot(epochs, error, color="#D4D7DB", linewidth=0.9, zorder=1)
        errors += error
    for (colour, marker), trial in zip(SERIES, complete[:5], strict=False):
        epochs, error = [r[1] for r in trial.curve], [1 - r[4] for r in trial.curve]
        label = f"trial {trial.number}: {100 * error[-1]:.2f} %"
        axes.plot(epochs, error, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label, zorder=2)
    longest, shortest = (f(t.curve[-1][1] for t in complete) for f in (max, min))
    if longest > 10 * shortest:
        axes.set_xscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation error")
    _set_y(axes, errors, "validation_error")
    axes.legend(title="best trials", fontsize=9.5, framealpha=0.95, edgecolor="white")
    return figure


def best_so_far(values: Sequence[float], samples: int = 2_000) -> Float[np.ndarray, "3 budget"]:
    """Median and 5 % and 95 % points of the best of n trials drawn with replacement, for every n: study variance.

    Resampling needs no independence in time: quasi-random trials and sweeps have no order; adaptive samplers do, and
    for them this is what their points would give in any other order.
    """
    drawn = np.random.default_rng(0).choice(np.asarray(values), (samples, len(values)))
    return np.quantile(np.minimum.accumulate(drawn, axis=1), (0.5, 0.05, 0.95), axis=0)


@styled
def figure_budget(trials: Sequence[Trial], objective: str) -> Figure:
    """The best value after so many trials, and what other orders of the same trials would have given."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.2, 4.4))
    axes = figure.subplots()
    ordered = sorted(trials, key=lambda t: t.number)
    values = [t.value if t.outcome == "complete" else math.inf for t in ordered]
    worst = max(v for v in values if math.isfinite(v))
    budget = np.arange(1, len(values) + 1)
    median, low, high = best_so_far([min(v, worst) for v in values])
    axes.fill_between(budget, low, high, color=BLUE, alpha=0.15, linewidth=0, label="90 % of bootstrapped studies")
    axes.plot(budget, median, color=BLUE, linewidth=1.8, label="their median")
    actual = np.minimum.accumulate(values)
    axes.step(budget, actual, where="post", color=VERMILION, linewidth=1.8, label="this study")
    _set_y(axes, [*low, *np.minimum(high, worst)], objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials")
    axes.set_ylabel(f"best {_label_y(objective)} so far")
    axes.legend(frameon=False)
    return figure


@styled
def figure_scientific(trials: Sequence[Trial], key: Axis, others: Sequence[Axis], objective: str) -> Figure:
    """The objective for each value of a scientific hyperparameter: its best trials, and against each other range.

    A panel of few values shows means, over trials in which all other such choices have their most frequent value.
    """
    from matplotlib.figure import Figure

    complete = [t for t in ranked(trials) if key.key in t.params]
    columns = min(3, len(others) + 1)
    rows = -(-(len(others) + 1) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.8 * rows + 0.6))
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    cap = _cap([t.value for t in complete])
    for place, (value, (colour, marker)) in enumerate(zip(key.ticks, itertools.cycle(SERIES), strict=False)):
        mine = [t for t in complete if t.params[key.key] == value]
        heights = _within(panels[0], [(place, t.value) for t in mine], cap, objective)
        panels[0].scatter([place] * len(mine), heights, s=18, color=colour, alpha=0.4)
        lowest = min(heights, default=math.nan)
        panels[0].plot([place - 0.25, place + 0.25], [lowest] * 2, color=colour, linewidth=2.5)
        for axes, other in zip(panels[1:], others, strict=False):
            there = [t for t in mine if other.key in t.params]
            style = {"color": colour, "marker": marker, "label": number(value)}
            if other.ticks:
                apart = [a for a in others if a.ticks and a is not other]
                usual = {a.key: _most_frequent([t.params.get(a.key) for t in complete]) for a in apart}
                there = [t for t in there if all(t.params.get(k) == v for k, v in usual.items())]
            points = _means([(other.place(t.params[other.key]), t.value) for t in there])
            heights = _within(axes, points.tolist(), cap, objective)
            if other.ticks or len(points) < len(there) or (len(complete) > 12 * len(key.ticks) and len(others) == 1):
                axes.plot(points[:, 0], heights, linewidth=1.6, markersize=5, **style)
            elif len(points):
                axes.scatter(points[:, 0], heights, s=30, alpha=0.8, **style)
    _set_x(panels[0], key)
    panels[0].set_title("all trials; bars: the best")
    for axes, other in zip(panels[1:], others, strict=False):
        _set_x(axes, other)
    for axes in panels[: len(others) + 1]:
        _set_y(axes, [min(t.value for t in complete), cap], objective)
    for axes in panels[::columns]:
        axes.set_ylabel(_label_y(objective))
    for axes in panels[len(others) + 1 :]:
        axes.set_axis_off()
    if others:
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, title=short(key.key), loc="outside upper left", ncols=8, frameon=False)
    return figure


def _most_frequent(values: Sequence[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)


def _means(points: Sequence[tuple[float, float]]) -> Float[np.ndarray, "places 2"]:
    """The mean height at each place, from left to right."""
    places = sorted({x for x, _ in points})
    return np.array([(x, np.mean([y for z, y in points if z == x])) for x in places]).reshape(-1, 2)


@styled
def figure_seeds(results: Mapping[str, Any]) -> Figure:
    """Winner and baseline under the same fresh seeds, joined by seed, and their difference with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2))
    pairs, gap = figure.subplots(1, 2, width_ratios=(2, 1))
    scores = results["test_accuracy"]
    columns = np.array([scores[role]["values"] for role in ("baseline", "winner")]) * 100
    pairs.plot([0, 1], columns, color=GREY, linewidth=0.9, alpha=0.7)
    for place, (column, colour) in enumerate(zip(columns, (GREY, BLUE), strict=True)):
        pairs.plot([place] * len(column), column, "o", color=colour, markersize=6)
        pairs.plot([place - 0.12, place + 0.12], [column.mean()] * 2, color=VERMILION, linewidth=2.5)
        side, align = ((-10, "right"), (10, "left"))[place]  # away from the lines between
        text = f"mean\n{column.mean():.2f} %"
        spot = place + 0.12 * (2 * place - 1), column.mean()
        pairs.annotate(text, spot, (side, 0), textcoords="offset points", ha=align, va="center")
    pairs.set_xticks([0, 1], ["baseline", "winner"])
    pairs.set_xlim(-0.9, 1.9)
    pairs.margins(y=0.15)
    pairs.set_ylabel("test accuracy, %")
    difference = scores["difference"]
    mean, half = 100 * difference["mean"], 100 * difference["half_interval"]
    gap.axhline(0, color=GREY, linewidth=1)
    gap.plot([0] * len(difference["values"]), 100 * np.array(difference["values"]), "o", color=GREY, alpha=0.5)
    gap.errorbar([0.3], [mean], [half], fmt="s", color=VERMILION, capsize=5, linewidth=1.8)
    gap.set_xlim(-0.4, 0.8)
    gap.set_xticks([])
    gap.set_ylabel("winner less baseline, points")
    gap.set_title(f"{mean:+.2f} +- {half:.2f}", fontsize=10)
    for axes in (pairs, gap):
        axes.grid(True, axis="y")
    return figure
