"""What a person sees of a run: a parameter table, a live bar in a terminal, a plain line an epoch elsewhere."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True, markup=False)  # names of runs and devices are no markup


def print_parameters(params: dict) -> int:
    """Prints name, shape and size of every parameter; gives their number."""
    import jax

    table = Table("parameter", "shape", "size", title="Parameters", title_justify="left")
    table.columns[2].justify = "right"
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in leaves:
        name = "/".join(entry.key for entry in path)
        table.add_row(name, " x ".join(map(str, leaf.shape)), f"{leaf.size:,}")
    total = sum(leaf.size for _, leaf in leaves)
    table.add_section()
    table.add_row("total", "", f"{total:,}")
    console.print(table)
    return total


class Bar:
    """Progress over all steps of a run, with the latest metrics beside it."""

    def __init__(self, progress: Progress | None, task):
        self._progress, self._task = progress, task

    def update(self, step: int, epoch: int, loss: float, accuracy: float, images_per_second: float) -> None:
        if self._progress:
            text = f"epoch {epoch}  loss {loss:.4f}  accuracy {accuracy:.2%}  {images_per_second:,.0f} images/s"
            self._progress.update(self._task, completed=step, metrics=text)

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        (self._progress.console if self._progress else console).print(text)


@contextlib.contextmanager
def bar(total_steps: int, first_step: int) -> Iterator[Bar]:
    """A live bar while the context lasts, if standard output is a terminal."""
    if not console.is_terminal:
        yield Bar(None, None)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console) as progress:
        yield Bar(progress, progress.add_task("", total=total_steps, completed=first_step, metrics=""))


def print_summary(summary: dict) -> None:
    """Prints the summary of a finished run, one field a row."""
    table = Table(show_header=False)
    for name, value in summary.items():
        shown = f"{value:.2%}" if name.endswith("accuracy") and value is not None else value
        table.add_row(name, f"{shown:,.4g}" if isinstance(shown, float) else str(shown))
    console.print(table)


def print_scores(scores: dict, class_names: tuple[str, ...]) -> None:
    """Prints what `metrics.evaluate_logits` found, and the confusion matrix."""
    low, high = scores["accuracy_interval"]
    console.print(f"{scores['dataset']} {scores['split']}: {scores['examples']:,} examples, {scores['errors']} errors")
    console.print(f"accuracy {scores['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})")
    console.print(f"negative log-likelihood {scores['negative_log_likelihood']:.4f} nats")
    console.print(f"expected calibration error {scores['expected_calibration_error']:.4f}")
    table = Table("label", *class_names, "precision", "recall", title="Predictions", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row, cells in zip(scores["per_class"], scores["confusion"], strict=True):
        shares = (row[key] for key in ("precision", "recall"))
        ends = ("-" if share is None else f"{share:.2%}" for share in shares)
        table.add_row(class_names[row["class"]], *map(str, cells), *ends)
    console.print(table)
