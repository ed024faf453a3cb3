"""Finished runs for the tests of what uses them, each trained by the real command, once for all test processes."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.commands import command

SMALL = ["--config.model.channels=(8,16)", "--config.model.pool_sizes=(2,)", "--config.model.dense=(64,)"]
RECIPES = {
    "mnist": [*SMALL, "--config.train_examples=12000", "--config.num_epochs=4", "--config.batch_size=64"],
    "digits": [*SMALL, "--config.num_epochs=12", "--config.batch_size=32", "--config.optimizer.ema_decay=0.99"],
}


# Members of an ensemble beside the run on `digits`: one of the same architecture, one of another.
MEMBERS = {
    "same": ["--config.seed=1"],
    "other": ["--config.seed=2", "--config.model.channels=(6,)", "--config.model.batch_norm=True"],
}


def once(directory: Path, last: str, make: Callable[[], None]) -> Path:
    """A directory that `make` fills, once for all test processes; `last` is the file that it writes last."""
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / last).exists():
            make()
    return directory


def train(dataset: str, directory: Path, data_dir: Path, *changes: str) -> Path:
    """The run directory of a small network that reads digits passably; `changes` are of its recipe."""
    fields = [f"--config.dataset={dataset}", f"--config.data_dir={data_dir}", *RECIPES[dataset], *changes]
    return once(directory, "summary.json", lambda: command("mnist_flax.main", f"--workdir={directory}", *fields))


def ensemble(digits_run: Path, data_dir: Path) -> tuple[Path, list[Path]]:
    """An ensemble on `digits`, and its members; all but the first are no more where they were when it was made."""
    directory, kept = digits_run.with_name("digits_ensemble"), digits_run.with_name("digits_members")
    places = {name: digits_run.with_name(f"digits_{name}") for name in MEMBERS}

    def make() -> None:
        for name, place in places.items():
            train("digits", place, data_dir, *MEMBERS[name])
        command("mnist_flax.ensemble", digits_run, *places.values(), f"--workdir={directory}")
        kept.mkdir()
        for name, place in places.items():
            shutil.move(place, kept / name)

    once(kept, list(MEMBERS)[-1], make)
    return directory, [digits_run, *(kept / name for name in MEMBERS)]
