"""Mean, standard deviation and interval over finished runs of one recipe: `python -m experiments.summarize RUN...`."""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mnist_flax.evaluation.metrics import none_if_nan
from mnist_flax.runtime import cli, run_dir, terminal
from mnist_flax.runtime import config as config_lib

FIELDS = ("train_accuracy", "validation_accuracy", "test_accuracy", "train_seconds", "test_seconds", "total_seconds")


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, sample standard deviation, and half the width of Student's t interval of the mean, at 95 %.

    With one value the last two are NaN.
    """
    from scipy import stats

    if len(values) < 2:
        return statistics.fmean(values), math.nan, math.nan
    deviation = statistics.stdev(values)
    half = stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
    return statistics.fmean(values), deviation, float(half)


def summary_stats(values: Iterable[float]) -> dict[str, Any]:
    """Values and what `mean_interval` gives of them, ready for JSON."""
    numbers = [float(value) for value in values]
    mean, deviation, half = map(none_if_nan, mean_interval(numbers))
    return {"values": numbers, "mean": mean, "deviation": deviation, "half_interval": half}


def add_means(table: Table, results: Sequence[Mapping[str, Any]], names: Sequence[str], *second: str) -> None:
    """Closes a table of results with number, mean, deviation and interval of each name, over those that have it."""
    table.add_section()
    columns = [[result[name] for result in results if result.get(name) is not None] for name in names]
    figures = [mean_interval(column) if column else (None, None, None) for column in columns]
    table.add_row("n", *second, *(str(len(column)) for column in columns))
    for i, row in enumerate(("mean", "deviation", "95 % +-")):
        table.add_row(row, *second, *(shown(name, figure[i]) for name, figure in zip(names, figures, strict=True)))


def shown(name: str, value: float | None) -> str:
    """A number as a table shows it, by what its name says it is: an accuracy, seconds or a loss."""
    if value is None or math.isnan(value):
        return "-"
    if name.endswith("accuracy"):
        return f"{value:.3%}"
    return f"{value:,.1f}" if name.endswith("seconds") else f"{value:.4f}"


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise cli.UserError("name finished run directories: python -m experiments.summarize RUN...")
    summaries = []
    directories = run_dir.distinct(argv[1:])
    configs = [run_dir.read_config(directory) for directory in directories]
    for directory, config in zip(directories, configs, strict=True):
        config.seed = configs[0].seed
        if changes := config_lib.differences(configs[0], config):
            raise cli.UserError(
                f"{directory} differs from {directories[0]} in more than its seed ({', '.join(changes)}): "
                "summarize one recipe"
            )
        summary = run_dir.read_summary(directory)
        if summary is None:
            raise cli.UserError(f"{directory} is not finished: run its training command again, then this one")
        summaries.append(summary)
    headings = (name.removesuffix("_accuracy").replace("_seconds", " s") for name in FIELDS)
    devices = dict.fromkeys(summary["device"] for summary in summaries)
    table = terminal.table("run", "seed", *headings, title=f"{configs[0].dataset}, {' and '.join(devices)}")
    for name, summary in zip(argv[1:], summaries, strict=True):
        table.add_row(Path(name).name, str(summary["seed"]), *(shown(field, summary.get(field)) for field in FIELDS))
    add_means(table, summaries, FIELDS, "")
    terminal.console.print(table)


if __name__ == "__main__":
    cli.run(main)
