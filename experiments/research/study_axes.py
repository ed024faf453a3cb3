"""Trials and hyperparameters as the figures of a study draw them: places, scales and labels of their axes."""

from __future__ import annotations  # matplotlib's types without its import

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mnist_flax.evaluation.figures import GREY
from mnist_flax.experiments.research import space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def set_x(axes: Axes, axis: Axis) -> None:
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


def set_y(axes: Axes, values: Sequence[float], objective: str) -> None:
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


def label_y(objective: str) -> str:
    return objective.replace("_", " ")


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials, best first."""
    return sorted((t for t in trials if t.outcome == "complete"), key=lambda t: (t.value, t.number))


def cap_of(values: Sequence[float]) -> float:
    """Where the objective's axis ends, so that a few hopeless trials do not flatten the rest: see `within`."""
    return float(min(max(values), 20 * np.median(values)))


def within(axes: Axes, points: Sequence[tuple[float, float]], cap: float, objective: str) -> list[float]:
    """Heights of the points as drawn; those above the cap lie at its rim, and get an arrow and their value."""
    rim = 1.15 * cap
    for x, y in points:
        if cap < y < math.inf:
            axes.plot(x, rim, "^", color="#111111", markersize=9, fillstyle="none", clip_on=False)
            axes.annotate(
                _shown(y, objective), (x, rim), (7, 0), textcoords="offset points", va="center", annotation_clip=False
            )
    return [y if y <= cap else rim for _, y in points]
