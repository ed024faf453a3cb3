"""Figures of a study, as pure functions of its trials, in the style of a run's figures."""

from __future__ import annotations  # matplotlib's types without its import

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from mnist_flax.evaluation.figures import BLUE, GREY, VERMILION, styled
from mnist_flax.experiments.research.study_axes import (
    SERIES,
    Axis,
    Trial,
    cap_of,
    label_y,
    number,
    ranked,
    set_x,
    set_y,
    short,
    within,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def figure_isolation(trials: Sequence[Trial], axes_of: Sequence[Axis], objective: str) -> Figure:
    """The objective against each hyperparameter alone; infeasible trials along the top, the best ringed."""
    from matplotlib.figure import Figure

    columns = min(3, len(axes_of))
    rows = -(-len(axes_of) // columns)
    figure = Figure(figsize=(max(6.2, 4.1 * columns), 3.5 * rows + 0.5))
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    complete = ranked(trials)
    best, cap = complete[0], cap_of([t.value for t in complete])
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
            y = within(axes, list(zip(x, (t.value for t in there), strict=True)), cap, objective)
            axes.scatter(x, y, s=26, color=colour, marker=marker, label=label, alpha=0.75, linewidths=1.3)
            drawn |= {t.number: (a, b) for t, a, b in zip(there, x, y, strict=True)}
        if best.number in drawn:
            axes.plot(*drawn[best.number], "o", markersize=13, fillstyle="none", color=VERMILION, mew=1.8, label="best")
        set_x(axes, axis)
        set_y(axes, [best.value, cap], objective)
    for axes in panels[len(axes_of) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(label_y(objective))
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
    axes.set_xticks(range(len(names) + 1), [*names, f"rank by\n{label_y(objective)}"])
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
    set_y(axes, errors, "validation_error")
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
    set_y(axes, [*low, *np.minimum(high, worst)], objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials")
    axes.set_ylabel(f"best {label_y(objective)} so far")
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
    cap = cap_of([t.value for t in complete])
    many = len(others) == 1 and len(complete) > 12 * len(key.ticks)
    for place, (value, (colour, marker)) in enumerate(zip(key.ticks, itertools.cycle(SERIES), strict=False)):
        mine = [t for t in complete if t.params[key.key] == value]
        _draw_values(panels[0], place, [t.value for t in mine], cap, objective, colour)
        for axes, other in zip(panels[1:], others, strict=False):
            there = [t for t in _comparable(mine, complete, other, others) if other.key in t.params]
            points = [(other.place(t.params[other.key]), t.value) for t in there]
            style = {"color": colour, "marker": marker, "label": number(value)}
            _draw_means(axes, points, bool(other.ticks) or many, cap, objective, style)
    panels[0].set_title("all trials; bars: the best")
    for axes, axis in zip(panels, (key, *others), strict=False):
        set_x(axes, axis)
        set_y(axes, [min(t.value for t in complete), cap], objective)
    for axes in panels[::columns]:
        axes.set_ylabel(label_y(objective))
    for axes in panels[len(others) + 1 :]:
        axes.set_axis_off()
    if others:
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, title=short(key.key), loc="outside upper left", ncols=8, frameon=False)
    return figure


def _draw_values(axes: Axes, place: float, values: Sequence[float], cap: float, objective: str, colour: str) -> None:
    """Values at one place, and a bar at the lowest."""
    heights = within(axes, [(place, value) for value in values], cap, objective)
    axes.scatter([place] * len(values), heights, s=18, color=colour, alpha=0.4)
    axes.plot([place - 0.25, place + 0.25], [min(heights, default=math.nan)] * 2, color=colour, linewidth=2.5)


def _draw_means(
    axes: Axes, points: Sequence[tuple[float, float]], joined: bool, cap: float, objective: str, style: dict[str, Any]
) -> None:
    """The mean at each place: a line if `joined`, or if a place has several points; else markers."""
    means = _means(points)
    heights = within(axes, means.tolist(), cap, objective)
    if joined or len(means) < len(points):
        axes.plot(means[:, 0], heights, linewidth=1.6, markersize=5, **style)
    elif len(means):
        axes.scatter(means[:, 0], heights, s=30, alpha=0.8, **style)


def _comparable(some: Sequence[Trial], trials: Sequence[Trial], axis: Axis, axes_of: Sequence[Axis]) -> list[Trial]:
    """Those of `some` trials that the axis of a choice may show: their other choices are the most frequent of all."""
    choices = [other.key for other in axes_of if other.ticks and other is not axis] if axis.ticks else []
    usual = {key: _most_frequent([t.params.get(key) for t in trials]) for key in choices}
    return [t for t in some if all(t.params.get(key) == value for key, value in usual.items())]


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
