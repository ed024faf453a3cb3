"""What saving costs, and what of it is the disk's: checkpoints, metrics and a summary, with and without `fsync`.

    python -m experiments.bench_saving [--config=configs/default.py] [--rounds=20] [--directory=DIR]

Saves the state of a recipe's network as training does, in turns with and without waiting for the disk, and prints
medians in milliseconds: how long training's own thread is kept, how long until all is saved, and CPU time.
`--directory` chooses the disk. The records in a checkpoint are those of the epochs before it, one for each split.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
from absl import flags

from mnist_flax.data import datasets
from mnist_flax.runtime import cli, config_flag, devices, metrics_log, run_dir, terminal
from mnist_flax.runtime import config as config_lib
from mnist_flax.training import checkpoint
from mnist_flax.training.state import init_state

_CONFIG, _ARGUMENTS = config_flag.define_flag()
_ROUNDS = flags.DEFINE_integer("rounds", 20, "saves of each kind", lower_bound=1)
_DIRECTORY = flags.DEFINE_string(
    "directory", None, "where to write; a directory of the system's temporary ones if not given"
)
_RECORD = {
    **{"step": 429, "epoch": 1, "split": "train", "loss": 0.2524853587150574, "accuracy": 0.9202943444252014},
    **{"learning_rate": 0.002, "images_per_second": 4096.123456789, "seconds": 13.123456789},
}


def measure(action: Callable[[], Callable[[], None]]) -> tuple[float, float, float]:
    """Milliseconds until `action` returns, until what it returned has been called and returned, and of CPU time."""
    used, began = time.process_time(), time.perf_counter()
    wait = action()
    returned = time.perf_counter()
    wait()
    return 1e3 * (returned - began), 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - used)


def main(argv: list[str]) -> None:
    config_flag.refuse_arguments(argv)
    if _DIRECTORY.value and not Path(_DIRECTORY.value).is_dir():
        raise cli.UserError(f"--directory={_DIRECTORY.value} is no directory: make it, or name another")
    config = _CONFIG.value
    config_lib.check_config(config)
    devices.available()
    state = jax.jit(lambda: init_state(config, len(datasets.CLASS_NAMES[config.dataset]), 0))()
    jax.block_until_ready(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as name:
        directory = Path(name)
        checkpoints = checkpoint.Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint.keep)
        metrics = metrics_log.Metrics(directory, "")
        steps = iter(range(1, 1_000_000))

        def save(records: int) -> Callable[[], None]:
            extra = {"metrics": f"{json.dumps(_RECORD)}\n" * records, "train_seconds": 1.0}
            checkpoints.save(next(steps), state, extra, 0.5)
            return checkpoints.wait

        def append() -> Callable[[], None]:
            metrics.append(_RECORD, {**_RECORD, "split": "validation"})
            return lambda: None

        def summarise() -> Callable[[], None]:
            run_dir.write_json(directory / "summary.json", _RECORD)
            return lambda: None

        actions: dict[str, Callable[[], Callable[[], None]]] = {
            f"checkpoint, {size:.1f} MB": lambda: save(2),
            f"checkpoint, {size:.1f} MB, 1,000 records": lambda: save(1_000),
            "an epoch's metrics": append,
            "summary.json": summarise,
        }
        table = terminal.table("what is saved", "fsync", "training waits, ms", "until saved, ms", "CPU, ms")
        for title, action in actions.items():
            taken: dict[str, list[tuple[float, float, float]]] = {"yes": [], "no": []}
            for _ in range(_ROUNDS.value + 1):
                for kind, times in taken.items():
                    off = mock.patch.object(os, "fsync", lambda descriptor: None)
                    with contextlib.nullcontext() if kind == "yes" else off:
                        times.append(measure(action))
            for kind, times in taken.items():  # the first of each is a warm-up
                medians = (statistics.median(column) for column in zip(*times[1:], strict=True))
                table.add_row(title, kind, *(f"{median:.1f}" for median in medians))
        checkpoints.close()
        metrics.close()
    terminal.console.print(table)


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
