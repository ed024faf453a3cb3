"""What a person sees of a run: a parameter table, a live bar in a terminal, a plain line an epoch elsewhere."""

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

# Rich would cut tables in files and pipes to 80 columns.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
console = Console(highlight=False, soft_wrap=True, markup=False, width=_WIDTH)  # names of runs are no markup
QUIET = Console(file=io.StringIO(), quiet=True)  # of calls in Python, which show nothing


def table(*headings: str, title: str | None = None, **options: Any) -> Table:
    """A table of text and, from the second column on, numbers; what does not fit is folded, never left out."""
    first, *rest = headings
    columns = Column(first, overflow="fold"), *(Column(name, overflow="fold", justify="right") for name in rest)
    return Table(*columns, title=title, title_justify="left", **options)


def print_parameters(params: dict, console: Console) -> int:
    """Prints name, shape and size of every parameter; gives their number."""
    import jax

    parameters = table("parameter", "shape", "size", title="Parameters")
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in leaves:
        name = "/".join(entry.key for entry in path)
        parameters.add_row(name, " x ".join(map(str, leaf.shape)), f"{leaf.size:,}")
    total = sum(leaf.size for _, leaf in leaves)
    parameters.add_section()
    parameters.add_row("total", "", f"{total:,}")
    console.print(parameters)
    return total


class Bar:
    """Progress over all steps of a run, with the latest metrics beside it."""

    def __init__(self, console: Console, progress: Progress | None = None, task=None):
        self._console, self._progress, self._task = console, progress, task

    def update(self, step: int, epoch: int, loss: float, accuracy: float, images_per_second: float) -> None:
        if self._progress:
            text = f"epoch {epoch} loss {loss:.4f} accuracy {accuracy:.2%} {images_per_second:,.0f} images/s"
            self._progress.update(self._task, completed=step, metrics=text)

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(text)


@contextlib.contextmanager
def bar(total_steps: int, first_step: int, console: Console = console) -> Iterator[Bar]:
    """A live bar while the context lasts, if the console is a terminal."""
    if not console.is_terminal:
        yield Bar(console)
        return
    # All of it fits into 80 characters, the bar getting what is left.
    metrics = TextColumn("{task.fields[metrics]}")
    columns = BarColumn(bar_width=None), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn(), metrics
    to_terminal = sys.stderr.isatty()  # what goes to a file stays there
    with Progress(*columns, console=console, expand=True, redirect_stderr=to_terminal) as progress:
        yield Bar(console, progress, progress.add_task("", total=total_steps, completed=first_step, metrics=""))


def print_summary(summary: dict, console: Console = console) -> None:
    """Prints the summary of a finished run, one field a row."""
    fields = table("", "", show_header=False)
    fields.columns[1].justify = "left"
    for name, value in summary.items():
        fields.add_row(name, shown(name, value))
    console.print(fields)


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2f} %"


def shown(name: str, value: Any) -> str:
    """A field of summary.json for people: shares as percentages, seconds as durations, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return plain(value)
    if name.endswith("accuracy"):
        return percent(value)
    if name.endswith("seconds"):
        minutes, seconds = divmod(round(value), 60)
        return f"{value:.1f} s" if value < 59.95 else f"{minutes} min {seconds} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.0f}"


def plain(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def print_scores(scores: dict, class_names: tuple[str, ...]) -> None:
    """Prints what `metrics.evaluate_logits` found, and the confusion matrix."""
    low, high = scores["accuracy_interval"]
    console.print(f"{scores['dataset']} {scores['split']}: {scores['examples']:,} examples, {scores['errors']} errors")
    console.print(f"accuracy {scores['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})")
    console.print(f"negative log-likelihood {scores['negative_log_likelihood']:.4f} nats")
    console.print(f"expected calibration error {scores['expected_calibration_error']:.4f}")
    names = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(class_names)]
    headings = ("label", *map(str, range(len(names))), "precision", "recall")
    predictions = table(*headings, title="Predictions", box=None, collapse_padding=True, pad_edge=False)
    for row, cells in zip(scores["per_class"], scores["confusion"], strict=True):
        shares = (row[key] for key in ("precision", "recall"))
        ends = ("-" if share is None else f"{share:.2%}" for share in shares)
        predictions.add_row(names[row["class"]], *map(str, cells), *ends)
    console.print(predictions)
