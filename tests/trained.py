"""Finished runs for the tests of what uses them, each trained by the real command, once for all test processes."""

import fcntl
from collections.abc import Callable
from pathlib import Path

from tests.commands import command

SMALL = ["--config.model.channels=(8,16)", "--config.model.pool_sizes=(2,)", "--config.model.dense=(64,)"]
RECIPES = {
    "mnist": [*SMALL, "--config.train_examples=12000", "--config.num_epochs=4", "--config.batch_size=64"],
    "digits": [*SMALL, "--config.num_epochs=12", "--config.batch_size=32", "--config.optimizer.ema_decay=0.99"],
}


def once(directory: Path, last: str, make: Callable[[], None]) -> Path:
    """A directory that `make` fills, once for all test processes; `last` is the file that it writes last."""
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / last).exists():
            make()
    return directory


def train(dataset: str, directory: Path, data_dir: Path) -> Path:
    """The run directory of a small network that reads digits passably."""
    fields = [f"--config.dataset={dataset}", f"--config.data_dir={data_dir}", *RECIPES[dataset]]
    return once(directory, "summary.json", lambda: command("mnist_flax.main", f"--workdir={directory}", *fields))
