"""Many runs of `mnist_flax.main`, a few at a time, each in its own process on its own cores."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, Progress, TextColumn

from mnist_flax.experiments.benchmarks import cores
from mnist_flax.runtime import run_dir, terminal
from mnist_flax.runtime.cli import RunError, UserError
from mnist_flax.runtime.metrics_log import read_records

_POLL_SECONDS = 0.5


class Training(NamedTuple):
    """One run of one recipe."""

    recipe: str
    seed: int
    directory: Path
    overrides: tuple[str, ...]  # --config.KEY=VALUE
    epochs: int

    @property
    def name(self) -> str:
        return f"{Path(self.recipe).stem} {self.seed}"

    @property
    def log(self) -> Path:
        """What its processes printed; the run directory itself is main's alone."""
        return self.directory.with_name(f"{self.directory.name}.log")

    def command(self, stage: str) -> list[str]:
        flags = [f"--config={self.recipe}", *self.overrides, f"--config.seed={self.seed}"]
        only = ["--train_only"] if stage == "train" else []
        return [sys.executable, "-m", "mnist_flax.main", *flags, f"--workdir={self.directory}", *only]

    def share_trained(self) -> float:
        """Epochs recorded over epochs to do; 0 before it began."""
        try:
            return read_records(self.directory / "metrics.jsonl")[-1]["epoch"] / self.epochs
        except UserError:  # there is none yet, or a damaged one, which the training writes anew
            return 0.0


def complete(trainings: Sequence[Training], stage: str, processes: int, stop: Callable[[], bool]) -> bool:
    """Brings all runs through a stage: "train", which the test set has no part in, or "score".

    Runs that were scored are left alone, and those waited for that a command which was killed has left at work. False
    when `stop()` came first: what was under way has saved its state.

    Raises:
      RunError: a run failed; the others were stopped, and resume.
    """
    waiting = [training for training in trainings if run_dir.read_summary(training.directory) is None]
    done = len(trainings) - len(waiting)
    told = False
    with _bar(stage, len(trainings)) as show, _Processes(stage, processes) as running:
        while waiting or running.trainings():
            held = [training for training in waiting if run_dir.is_claimed(training.directory)]
            if held and not told:
                terminal.console.print(f"waiting for {held[0].name}, which an earlier command still trains")
                told = True
            startable = [training for training in waiting if training not in held]
            for slot in running.free_slots():
                if startable and len(held) + len(running.trainings()) < processes and not stop():
                    training = startable.pop(0)
                    waiting.remove(training)
                    running.start(slot, training)
            done += running.collect()
            unfinished = [*waiting, *running.trainings()] if stage == "train" else []
            show(done, sum(training.share_trained() for training in unfinished))
            if stop():
                return False
            time.sleep(_POLL_SECONDS)
    return True


class _Processes:
    """Processes that bring runs through a stage, one a slot, each on its own cores; leaving the context ends them."""

    def __init__(self, stage: str, slots: int):
        self._stage, self._shares = stage, _core_shares(slots)
        self._running: dict[int, tuple[Training, subprocess.Popen]] = {}  # by slot

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        """Has each save its state, and waits for it."""
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for _, process in self._running.values():
            process.wait()

    def trainings(self) -> list[Training]:
        return [training for training, _ in self._running.values()]

    def free_slots(self) -> list[int]:
        return [slot for slot in range(len(self._shares)) if slot not in self._running]

    def start(self, slot: int, training: Training) -> None:
        self._running[slot] = training, _start(training, self._stage, self._shares[slot])

    def collect(self) -> int:
        """Frees the slots of processes that ended; gives their number.

        Raises:
          RunError: one failed.
        """
        ended = [slot for slot, (_, process) in self._running.items() if process.poll() is not None]
        for slot in ended:
            training, process = self._running.pop(slot)
            if process.returncode:
                raise RunError(
                    f"{training.name} ended with status {process.returncode}, as {training.log} tells: "
                    "put that right and give the same command again"
                )
        return len(ended)


def _start(training: Training, stage: str, share: set[int]) -> subprocess.Popen:
    training.directory.parent.mkdir(parents=True, exist_ok=True)
    with training.log.open("a") as log, cores.bound(share):
        # In a session of its own: Ctrl-C reaches this process alone, which then asks each run once to stop.
        return subprocess.Popen(
            training.command(stage),
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # several may share a GPU
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _core_shares(processes: int) -> list[set[int]]:
    """The cores of each process: a part of those that this one may use, or all where there are too few.

    Two trainings on a core each do a fifth more than one after the other on both, which wait for each other.
    """
    available = sorted(cores.usable())
    return [set(available[slot::processes]) or set(available) for slot in range(processes)]


@contextlib.contextmanager
def _bar(stage: str, total: int) -> Iterator[Callable[[int, float], None]]:
    """Shows how many runs are done, and parts of others: a bar in a terminal, else a line whenever one more is."""
    started, first, said = time.monotonic(), None, -1

    def left(done: float) -> str:
        nonlocal first
        first = done if first is None else first
        return time_left(time.monotonic() - started, done - first, total - done)

    if terminal.console.is_terminal:
        columns = BarColumn(bar_width=None), TextColumn("{task.completed:.1f}/{task.total} runs{task.fields[left]}")
        with Progress(TextColumn(stage), *columns, console=terminal.console, expand=True) as bar:
            task = bar.add_task("", total=total, left="")
            yield lambda done, parts: bar.update(task, completed=done + parts, left=left(done + parts))
        return

    def say(done: int, parts: float) -> None:
        nonlocal said
        about = left(done + parts)
        if done != said:
            said = done
            terminal.console.print(f"{stage}: {done} of {total} runs{about}")

    yield say


def time_left(seconds: float, done: float, to_do: float) -> str:
    """How long what is to do takes, in hours, minutes and seconds, if so much was done in so many seconds."""
    return f", about {timedelta(seconds=round(seconds / done * to_do))} left" if done > 0 and to_do > 0 else ""
