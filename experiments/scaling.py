"""How time and memory grow with the data, the epochs and the batch: runs of the real command, one after another.

    python -m experiments.scaling [--config=configs/classic.py] [--sweeps=examples,epochs,batch] [--output=DIR]

`examples`: subsets of 1,000 to 60,000, each for as many epochs as make 60,000 images. `epochs`: 1 to 50 over 5,000
images, with the resident memory at the end of each. `batch`: 32 to 4,096, one epoch of 60,000. No validation, so that
every image was trained on; what an epoch costs besides (a checkpoint, a record) is in the cost of its images,
compilation is not. Memory is that of the whole command, its report included.

Writes `scaling.json` and `scaling.png` to `--output`. A measurement found there is not repeated.
"""

from __future__ import annotations  # matplotlib's types without its import

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from mnist_flax.evaluation.figures import BLUE, styled
from mnist_flax.runtime import cli, run_dir, terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IMAGES = 60_000
SWEEPS: dict[str, list[dict[str, int]]] = {
    "examples": [
        {"train_examples": n, "num_epochs": _IMAGES // n, "batch_size": 128}
        for n in (1_000, 2_000, 5_000, 15_000, 30_000, 60_000)
    ],
    "epochs": [{"train_examples": 5_000, "num_epochs": n, "batch_size": 128} for n in (1, 2, 5, 10, 25, 50)],
    "batch": [
        {"train_examples": _IMAGES, "num_epochs": 1, "batch_size": n}
        for n in (32, 64, 128, 256, 512, 1_024, 2_048, 4_096)
    ],
}

_CONFIG = flags.DEFINE_string("config", "configs/classic.py", "recipe that is trained")
_SWEEPS = flags.DEFINE_list("sweeps", list(SWEEPS), "what is varied")
_OUTPUT = flags.DEFINE_string(
    "output", None, "directory of runs and results; a new one under runs/scaling/ if not given"
)


def measure(recipe: str, fields: Mapping[str, int]) -> dict[str, Any]:
    """Trains once with the real command: seconds, and MB of memory at the end of each epoch and at most.

    Raises:
      SystemExit: the command refused what it was given.
      RunError: it failed.
    """
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "run"
        overrides = [f"--config.{key}={value}" for key, value in {**fields, "validation_examples": 0}.items()]
        command = [sys.executable, "-m", "mnist_flax.main", f"--config={recipe}", f"--workdir={directory}", *overrides]
        memory, peak = _watch(command, directory / "metrics.jsonl")
        summary = run_dir.read_summary(directory)
    assert summary
    images = summary["steps"] * fields["batch_size"]
    return {
        **fields,
        "images": images,
        "microseconds_per_image": 1e6 * summary["train_seconds"] / images,
        "compile_seconds": summary["compile_seconds"],
        "peak_megabytes": peak,
        "epoch_megabytes": memory,
        "device": summary["device"],
    }


def _watch(command: Sequence[str], metrics: Path) -> tuple[list[float], float]:
    """Runs a training command to its end: MB resident whenever `metrics` grew by an epoch, and MB at most."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory: list[float] = []
    ended = 0
    try:
        while not ended:
            time.sleep(0.01)
            epochs = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if epochs > len(memory):
                memory += [_resident_megabytes(process.pid)] * (epochs - len(memory))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    finally:
        if not ended:  # interrupted
            process.kill()
            process.wait()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == 2:
        sys.exit(2)  # a mistake, which it has told
    if process.returncode:
        raise cli.RunError(f"{' '.join(command)} ended with status {process.returncode}")
    return memory, usage.ru_maxrss / 1024


def _resident_megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def print_table(rows: Sequence[dict], title: str) -> None:
    headings = ("examples", "epochs", "batch", "us/image", "images/s", "compiled in", "peak memory")
    table = terminal.table(*headings, title=title)
    for row in rows:
        table.add_row(
            f"{row['train_examples']:,}",
            f"{row['num_epochs']:,}",
            f"{row['batch_size']:,}",
            f"{row['microseconds_per_image']:.0f}",
            f"{1e6 / row['microseconds_per_image']:,.0f}",
            f"{row['compile_seconds']:.1f} s",
            f"{row['peak_megabytes']:,.0f} MB",
        )
    terminal.console.print(table)


@styled
def figure_scaling(results: Mapping[str, Sequence[dict]]) -> Figure:
    """Cost an image over each sweep, and the memory of the longest run over its epochs; axes start at zero."""
    from matplotlib.figure import Figure

    axis = {
        "examples": ("train_examples", "training examples"),
        "epochs": ("num_epochs", "epochs"),
        "batch": ("batch_size", "batch size"),
    }
    longest = max((row for rows in results.values() for row in rows), key=lambda row: row["num_epochs"])
    figure = Figure(figsize=(9, 6))
    panels = figure.subplots(2, 2).flat
    for axes, (name, rows) in zip(panels, results.items(), strict=False):
        field, label = axis[name]
        costs = [row["microseconds_per_image"] for row in rows]
        axes.plot([row[field] for row in rows], costs, "o-", color=BLUE)
        axes.set(xscale="log", xlabel=label, ylabel="microseconds an image", ylim=(0, 1.1 * max(costs)))
        axes.set_xticks([row[field] for row in rows], [f"{row[field]:,}" for row in rows], rotation=30)
        axes.minorticks_off()
        axes.grid(axis="y")
    epochs = range(1, len(longest["epoch_megabytes"]) + 1)
    axes = figure.axes[len(results)]
    axes.plot(epochs, longest["epoch_megabytes"], color=BLUE)
    axes.set(xlabel="epoch", ylabel="resident memory, MB", ylim=(0, 1.1 * max(longest["epoch_megabytes"])))
    axes.grid(axis="y")
    for unused in figure.axes[len(results) + 1 :]:
        unused.remove()
    return figure


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: see --help")
    if not _SWEEPS.value or not SWEEPS.keys() >= set(_SWEEPS.value):
        raise cli.UserError(f"--sweeps={','.join(_SWEEPS.value)} must be some of {','.join(SWEEPS)}")
    if not Path("/proc/self/status").exists():
        raise cli.UserError("memory is read from /proc: run this on Linux")
    out = Path(_OUTPUT.value or run_dir.new_directory("scaling"))
    out.mkdir(parents=True, exist_ok=True)
    print(out, flush=True)
    results: dict[str, list[dict]] = {}
    for name in dict.fromkeys(_SWEEPS.value):
        results[name] = []
        for fields in SWEEPS[name]:
            done = out / f"{'-'.join(map(str, (Path(_CONFIG.value).stem, *fields.values())))}.json"
            if not done.exists():
                run_dir.write_json(done, measure(_CONFIG.value, fields))
            results[name].append(run_dir.read_json(done))
        print_table(results[name], f"{name}, {_CONFIG.value}, {results[name][0]['device']}")
    run_dir.write_json(out / "scaling.json", results)
    figure_scaling(results).savefig(out / "scaling.png")


if __name__ == "__main__":
    cli.run(main)
