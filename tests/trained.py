"""Finished runs for the tests of what uses them, each trained by the real command, once for all test processes."""

import fcntl
from pathlib import Path

from tests.commands import command

SMALL = ["--config.model.channels=(8,16)", "--config.model.pool_sizes=(2,)", "--config.model.dense=(64,)"]
RECIPES = {
    "mnist": [*SMALL, "--config.train_examples=12000", "--config.num_epochs=4", "--config.batch_size=64"],
    "digits": [*SMALL, "--config.num_epochs=12", "--config.batch_size=32", "--config.optimizer.ema_decay=0.99"],
}


def train(dataset: str, directory: Path, data_dir: Path) -> Path:
    """The run directory of a small network that reads digits passably."""
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "summary.json").exists():
            fields = [f"--config.dataset={dataset}", f"--config.data_dir={data_dir}"]
            command("mnist_flax.main", f"--workdir={directory}", *fields, *RECIPES[dataset])
    return directory
