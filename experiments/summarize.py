"""Mean, standard deviation and interval over finished runs: `python -m experiments.summarize RUN...`."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mnist_flax import cli, progress, run

FIELDS = ("train_accuracy", "validation_accuracy", "test_accuracy", "train_seconds", "test_seconds", "total_seconds")


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, sample standard deviation, and half the width of Student's t interval of the mean.

    With one value the last two are NaN.
    """
    from scipy import stats

    if len(values) < 2:
        return statistics.fmean(values), math.nan, math.nan
    deviation = statistics.stdev(values)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return statistics.fmean(values), deviation, float(half)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise cli.UserError("name finished run directories: python -m experiments.summarize RUN...")
    summaries = []
    for directory in map(Path, argv[1:]):
        run.read_config(directory)
        summary = run.read_summary(directory)
        if summary is None:
            raise cli.UserError(f"{directory} is not finished: run its training command again, then this one")
        summaries.append(summary)
    datasets = {summary["dataset"] for summary in summaries}
    if len(datasets) > 1:
        raise cli.UserError(f"these runs are of different datasets ({', '.join(sorted(datasets))}): summarize one")
    headings = (name.removesuffix("_accuracy").replace("_seconds", " s") for name in FIELDS)
    table = Table("run", "seed", *headings, title=f"{datasets.pop()}, {summaries[0]['device']}", title_justify="left")
    for name, summary in zip(argv[1:], summaries, strict=True):
        table.add_row(Path(name).name, str(summary["seed"]), *(_shown(field, summary.get(field)) for field in FIELDS))
    table.add_section()
    columns = [[summary[name] for summary in summaries if summary.get(name) is not None] for name in FIELDS]
    figures = [mean_interval(column) if column else (None, None, None) for column in columns]
    for i, row in enumerate(("mean", "deviation", "95 % +-")):
        cells = (_shown(name, figure[i]) for name, figure in zip(FIELDS, figures, strict=True))
        table.add_row(row, f"n = {len(summaries)}", *cells)
    progress.console.print(table)


def _shown(name: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3%}" if name.endswith("accuracy") else f"{value:,.1f}"


if __name__ == "__main__":
    cli.run(main)
