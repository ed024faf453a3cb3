"""Trains the same network in this project and in other libraries, in turns: who is how fast?

    pip install -e '.[peers]'
    python -m experiments.benchmark [--peers=torch,keras,flax] [--batch=128,1024] [--dtype=float32] [--output=DIR]

The network is that of `configs/classic.py`, with `--batch_norm` after each convolution too; batches, their order and
the optimizer are the same for all. Every contender (`experiments/benchmarks/contenders/`) is a process of its own that
waits while it is not asked. All first train `--check_steps` steps, which warms them up, and of whose last quarter the
loss is shown: all should learn alike. Then they take turns, in `--rounds` rounds: a burst of about `--seconds` each,
forwards in one round, backwards in the next. The project is compared with a peer of the same type within each round.
Peaks are those of large matrix products, measured in the same rounds; the share is of the products that the network
needs, and no other work. Before each round it is measured how far apart the first two cores are, which a virtual
machine changes at times.

Writes `benchmark.json` and `benchmark.png` to `--output`. On a GPU the same command runs (with --batch=128,1024,8192).
"""

from __future__ import annotations  # matplotlib's types without its import

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from rich.text import Text

from mnist_flax.data import datasets, prepare
from mnist_flax.evaluation.figures import BLUE, GREY, styled
from mnist_flax.experiments.benchmarks import cores
from mnist_flax.experiments.benchmarks.contenders import (
    ENVIRONMENT,
    FLOPS_PER_IMAGE,
    MEASURES_PRODUCTS,
    NAMES,
    PACKAGES,
    STEPS,
    TORCH_ENVIRONMENT,
)
from mnist_flax.runtime import cli, run_dir, terminal
from mnist_flax.runtime.config import default_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PEERS = flags.DEFINE_list("peers", ["torch", "keras", "flax"], "whom to compare the project with")
_BATCH = flags.DEFINE_list("batch", ["128"], "batch sizes")
_DTYPE = flags.DEFINE_list("dtype", ["bfloat16", "float32"], "types of products and activations")
_BATCH_NORM = flags.DEFINE_boolean("batch_norm", False, "batch norm after each convolution, in all networks")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "times that every contender has its turn", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "of a burst", lower_bound=0.01)
_CHECK_STEPS = flags.DEFINE_integer("check_steps", 64, "steps of warm-up, after which losses are compared", 4 * STEPS)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "directory for results; a new one under runs/benchmark/ if not given",
    allow_override=True,  # a process may import several commands
)

_EXAMPLES = 55_000  # of random data: as many as MNIST leaves for training


class Contender:
    """A contender's process: it computes while it is asked, and only then."""

    def __init__(self, name: str, dtype: str, batch_size: int, examples: Path, batch_norm: bool = False):
        self.name, self.dtype, self.batch_size = name, dtype, batch_size
        self.rates: list[float] = []  # images a second, one a round
        self.peaks: list[float] = []  # of products, in floating-point operations a second, one a round
        self.steps = STEPS  # in a burst
        self.loss = self.idle_cpu_seconds = 0.0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = [name, dtype, str(batch_size), str(examples), *(["batch_norm"] if batch_norm else [])]
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_flax.experiments.benchmarks.contenders", *arguments],
            env=os.environ | ENVIRONMENT | (TORCH_ENVIRONMENT if name == "torch" else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert process.stdin and process.stdout
        self._process, self._requests, self._answers = process, process.stdin, process.stdout

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
          RunError: the process ended.
        """
        line = self._answers.readline()
        if not line:
            self._errors.seek(0)
            last = ([text for text in self._errors.read().splitlines() if text.strip()] or ["it said nothing"])[-1]
            raise cli.RunError(f"{NAMES[self.name]} in {self.dtype}, batch {self.batch_size}, failed: {last.strip()}")
        return json.loads(line)

    def ask(self, request: str | int) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(request, file=self._requests, flush=True)
        answer = self.answer()
        self.idle_cpu_seconds += answer["idle_cpu_seconds"]
        return answer

    def warm_up(self, check_steps: int, seconds: float) -> None:
        """Trains `check_steps` steps, keeps the loss of the last quarter, and chooses the length of a burst."""
        tail = _whole(check_steps / 4)
        self.ask(_whole(check_steps) - tail)
        answer = self.ask(tail)
        self.loss, self.steps = answer["loss"], _whole(tail * seconds / answer["seconds"])

    def take_turn(self) -> None:
        self.rates.append(self.steps * self.batch_size / self.ask(self.steps)["seconds"])
        if self.name in MEASURES_PRODUCTS:
            self.peaks.append(self.ask("peak")["flops"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._requests, self._answers, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()


def _whole(steps: float) -> int:
    return max(1, round(steps / STEPS)) * STEPS


def compare(
    names: Sequence[str], dtypes: Sequence[str], batch_size: int, examples: Path
) -> tuple[list[dict], list[float]]:
    """Results of one batch size: a row for each contender and type, the project's first, and the cores' distances."""
    norm = _BATCH_NORM.value
    contenders = [Contender(name, dtype, batch_size, examples, norm) for dtype in dtypes for name in names]
    try:
        descriptions = [contender.answer()["description"] for contender in contenders]  # once it is ready
        for contender in contenders:
            contender.warm_up(_CHECK_STEPS.value, _SECONDS.value)
        for contender in contenders:
            contender.idle_cpu_seconds = 0.0
        started = time.perf_counter()
        distances = []
        for turn in range(_ROUNDS.value):
            if (seconds := cores.exchange_seconds()) is not None:
                distances.append(seconds)
            for contender in contenders if turn % 2 == 0 else reversed(contenders):
                contender.take_turn()
        wall_seconds = time.perf_counter() - started
    finally:
        for contender in contenders:
            contender.close()
    peaks = {d: max(peak for c in contenders if c.dtype == d for peak in c.peaks) for d in dtypes}
    ours = {contender.dtype: contender.rates for contender in contenders if contender.name == "project"}
    rows = [
        {
            "contender": contender.name,
            "description": description,
            "dtype": contender.dtype,
            "batch_size": batch_size,
            "images_per_second": contender.rates,
            "project_over_this": [a / b for a, b in zip(ours[contender.dtype], contender.rates, strict=True)],
            "peak_flops": peaks[contender.dtype],
            "share_of_peak": statistics.median(contender.rates) * FLOPS_PER_IMAGE / peaks[contender.dtype],
            "loss": contender.loss,
            "idle_cpu_share": contender.idle_cpu_seconds / wall_seconds,
        }
        for contender, description in zip(contenders, descriptions, strict=True)
    ]
    return rows, distances


def print_table(rows: Sequence[dict], title: str) -> None:
    """The results of one batch size."""
    headings = ("", "images/s", "range", "project / it", "of peak", "loss")
    table = terminal.table(*headings, title=f"Training, batch {rows[0]['batch_size']:,}, {title}")
    dtype = None
    for row in rows:
        if row["dtype"] != dtype:
            dtype = row["dtype"]
            table.add_section()
            table.add_row(Text(dtype, style="bold"))
        rates, ratios = row["images_per_second"], row["project_over_this"]
        table.add_row(
            NAMES[row["contender"]],
            f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f} - {max(rates):,.0f}",
            "" if row["contender"] == "project" else f"{statistics.median(ratios):.2f}",
            f"{row['share_of_peak']:.1%}",
            f"{row['loss']:.3f}",
        )
    terminal.console.print(table)


@styled
def figure_speeds(rows: Sequence[dict], title: str) -> Figure:
    """Images a second as bars, a panel for each batch size and type; whiskers from the slowest to the fastest round."""
    from matplotlib.figure import Figure

    panels: dict[tuple[int, str], list[dict]] = {}
    for row in rows:
        panels.setdefault((row["batch_size"], row["dtype"]), []).append(row)
    figure = Figure(figsize=(8, 0.5 + sum(0.6 + 0.35 * len(panel) for panel in panels.values())))
    heights = [1 + len(panel) for panel in panels.values()]
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((batch_size, dtype), panel) in zip(all_axes, panels.items(), strict=True):
        rates = np.array([row["images_per_second"] for row in panel])
        medians = np.median(rates, 1)
        colors = [BLUE if row["contender"] == "project" else GREY for row in panel]
        whiskers = np.stack([medians - rates.min(1), rates.max(1) - medians])
        names = [NAMES[row["contender"]] for row in panel]
        axes.barh(names, medians, color=colors, xerr=whiskers, error_kw={"ecolor": "black", "capsize": 3})
        for i, (median, highest) in enumerate(zip(medians, rates.max(1), strict=True)):
            axes.annotate(f"{median:,.0f}", (highest, i), (6, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{dtype}, batch {batch_size:,}")
        axes.grid(axis="x")
    all_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    all_axes[-1].set_xlabel(f"images a second in training, {title}")
    return figure


def _examples() -> tuple[datasets.Split, str]:
    """Training examples and what they are: MNIST's if they are prepared, random ones of the same shape otherwise."""
    if prepare.is_prepared("mnist"):
        split = datasets.load(default_config()).train
        return split, f"{len(split.labels):,} training images of MNIST"
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (_EXAMPLES, 28, 28), np.uint8)
    labels = generator.integers(0, 10, _EXAMPLES).astype(np.int32)
    return datasets.Split(images, labels), f"{_EXAMPLES:,} random images (MNIST is not prepared)"


def check_flags(peers: Sequence[str], dtypes: Sequence[str], batches: Sequence[str], examples: int) -> None:
    for flag, values in (("dtype", dtypes), ("batch", batches)):
        if not values:
            raise cli.UserError(f"--{flag}= names nothing: name one or more, or leave it out")
    for name in peers:
        if name not in PACKAGES:
            raise cli.UserError(f"--peers={name} is unknown: choose from {', '.join(PACKAGES)}")
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise cli.UserError(
                f"--peers={name} needs {' and '.join(missing)}: run pip install -e '.[peers]', or name other --peers"
            )
    for dtype in dtypes:
        if dtype not in ("bfloat16", "float32"):
            raise cli.UserError(f"--dtype={dtype} is unknown: choose from bfloat16, float32")
    for batch in batches:
        if not batch.isdecimal() or not 1 <= int(batch[:20]) <= examples:
            raise cli.UserError(f"--batch={batch} must be a whole number from 1 to {examples:,}, or several: 128,1024")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: see --help")
    split, kind = _examples()
    if _BATCH_NORM.value:
        kind = f"with batch norm, {kind}"
    peers, dtypes, batches = (list(dict.fromkeys(flag.value)) for flag in (_PEERS, _DTYPE, _BATCH))  # each once
    check_flags(peers, dtypes, batches, len(split.labels))
    out = Path(_OUTPUT.value or run_dir.new_directory("benchmark"))
    out.mkdir(parents=True, exist_ok=True)
    print(out, flush=True)
    rows: list[dict] = []
    distances: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        examples = Path(directory) / "examples.npz"
        np.savez(examples, images=split.images, labels=split.labels)
        for batch in batches:
            found, apart = compare(["project", *peers], dtypes, int(batch), examples)
            print_table(found, kind)
            rows, distances = rows + found, distances + apart
    for name, description in {row["contender"]: row["description"] for row in rows}.items():
        terminal.console.print(f"{NAMES[name]}: {description}")
    for dtype in dtypes:
        peak = max(row["peak_flops"] for row in rows if row["dtype"] == dtype)
        terminal.console.print(f"peak of {dtype} products: {peak / 1e12:.3g} TFLOP/s")
    idle = max(row["idle_cpu_share"] for row in rows)
    terminal.console.print(f"a waiting contender kept at most {idle:.2%} of a core busy")
    if distances:
        shown = ", ".join(f"{seconds * 1e6:.1f}" for seconds in distances)
        terminal.console.print(f"microseconds to copy 256 kB that another core wrote, before each round: {shown}")
    record = {"examples": kind, "seconds": _SECONDS.value, "exchange_seconds": distances, "rows": rows}
    run_dir.write_json(out / "benchmark.json", record)
    figure_speeds(rows, kind).savefig(out / "benchmark.png")


if __name__ == "__main__":
    cli.run(main)
