"""Whether anything grows in a long run: memory, the time of an epoch, the disk.

    python -m experiments.long_run [--epochs=500] [--config=RECIPE] [--workdir=DIR] [-- --config.KEY=VALUE ...]

Trains with the real command and looks at it from outside after every epoch: resident memory, threads, open files, bytes
under the run directory, checkpoints kept; and reads metrics.jsonl and the TensorBoard file, which must be whole at
every moment. Prints medians over each tenth of the run, and writes `DIR.json` beside the run directory DIR.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from mnist_flax.experiments.faults import sabotage
from mnist_flax.runtime import cli, run_dir, terminal

_EPOCHS = flags.DEFINE_integer("epochs", 500, "epochs to train", lower_bound=20)
_CONFIG = flags.DEFINE_string("config", "configs/digits.py", "recipe that is trained")
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a new one under runs/long_run/ if not given")


class DirectoryReader:
    """Reads what is added to metrics.jsonl and the TensorBoard file, so that looking costs the same in every epoch."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._rest = ""
        self._places = [0, 0]
        self.epochs = self.epochs_in_tensorboard = 0

    def look(self) -> None:
        """Reads on.

        Raises:
          ValueError: a line, or a record, was written in part, and it is not the last.
        """
        with (self._directory / "metrics.jsonl").open() as file:
            file.seek(self._places[0])
            *lines, self._rest = (self._rest + file.read()).split("\n")
            self._places[0] = file.tell()
        self.epochs = max([self.epochs, *(json.loads(line)["epoch"] for line in lines)])
        curves, self._places[1] = sabotage.read_events(sabotage.events_file(self._directory), self._places[1])
        self.epochs_in_tensorboard += len(curves.get("train/loss", []))


def watch(command: list[str], directory: Path) -> list[dict[str, Any]]:
    """Runs a training command to its end; gives an observation for each epoch that was seen to end.

    Raises:
      SystemExit: the command refused what it was given.
      RunError: it failed, or a file was not whole while it was written.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    reader, observations = DirectoryReader(directory), []
    try:
        while process.poll() is None:
            epochs = reader.epochs
            if (directory / "metrics.jsonl").exists() and list((directory / run_dir.TENSORBOARD).glob("*")):
                reader.look()
            if reader.epochs > epochs:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):  # it has just ended
                    observations.append(_observe(process.pid, directory, reader))
            time.sleep(0.02)
    except ValueError as error:
        raise cli.RunError(f"a file was not whole while it was written: {error}") from error
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
    if process.returncode == 2:
        sys.exit(2)  # a mistake, which it has told
    if process.returncode:
        raise cli.RunError(f"{' '.join(command)} ended with status {process.returncode}")
    return observations


def _observe(pid: int, directory: Path, reader: DirectoryReader) -> dict[str, Any]:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "epoch": reader.epochs,
        "epochs_in_tensorboard": reader.epochs_in_tensorboard,
        "resident_megabytes": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "open_files": len(list((process / "fd").iterdir())),
        "disk_megabytes": _bytes(directory) / 1e6,
        "checkpoints": len([path for path in (directory / run_dir.CHECKPOINTS).iterdir() if path.name.isdigit()]),
    }


def _bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that was just removed, or renamed
            total += path.stat().st_size
    return total


def tenths(observations: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over each tenth of the epochs; the first epoch, which waits for compilation, is left out."""
    ends = [record["seconds"] for record in records if record["split"] == "train"]
    epochs = len(ends)
    rows = []
    for tenth in range(10):
        first, last = tenth * epochs // 10 + 1, (tenth + 1) * epochs // 10
        times = [1e3 * (ends[i] - ends[i - 1]) for i in range(max(first - 1, 1), last)]
        seen = [o for o in observations if first <= o["epoch"] <= last]
        row = {"epochs": f"{first}-{last}", "milliseconds an epoch": statistics.median(times)}
        for key in ("resident_megabytes", "threads", "open_files", "disk_megabytes", "checkpoints"):
            row[key.replace("_", " ")] = statistics.median(o[key] for o in seen) if seen else float("nan")
        rows.append(row)
    return rows


def main(argv: list[str]) -> None:
    overrides = argv[1:]
    if bad := [argument for argument in overrides if not argument.startswith("--config.")]:
        raise cli.UserError(
            f"{bad[0]!r} is no flag: see --help; fields of the config go after --, as --config.KEY=VALUE"
        )
    if not Path("/proc/self/status").exists():
        raise cli.UserError("memory is read from /proc: run this on Linux")
    directory = Path(_WORKDIR.value or run_dir.new_directory("long_run"))
    print(directory, flush=True)
    fields = [f"--config.num_epochs={_EPOCHS.value}", f"--config={_CONFIG.value}", f"--workdir={directory}"]
    observations = watch([sys.executable, "-m", "mnist_flax.main", *fields, *overrides], directory)
    if not observations:
        raise cli.UserError(f"{directory} was finished before: name another --workdir")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = tenths(observations, [json.loads(line) for line in lines])
    table = terminal.table(*rows[0], title=f"{_EPOCHS.value} epochs of {_CONFIG.value}")
    for row in rows:
        table.add_row(*(f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    terminal.console.print(table)
    run_dir.write_json(directory.with_name(f"{directory.name}.json"), {"tenths": rows, "epochs": observations})


if __name__ == "__main__":
    cli.run(main)
