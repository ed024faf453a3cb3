"""Training as one call: from a config to a finished run directory."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from mnist_flax.data import datasets
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import devices, distributed, run_dir, settings, terminal
from mnist_flax.training import finalize, loop


@settings.pinned()
def train(
    config: ConfigDict,
    directory: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    score: bool = True,
    console: Console = terminal.QUIET,
    started: float | None = None,
) -> bool:
    """Trains the run of a config in a directory, from where it stands to its end; a finished run is left as it is.

    Every mistake in the config is found before data are prepared. With several processes all call this.

    Args:
      config: checked before anything is written.
      directory: run directory; created if need be.
      stop: asked between calls of the compiled program; when true, training saves a checkpoint and ends.
      score: whether the test set is scored at the end, which finishes the run.
      console: where progress and results are shown.
      started: `time.perf_counter()` when the work began, for `total_seconds`; now if not given.

    Returns:
      Whether training reached its end, rather than being stopped.

    Raises:
      UserError: the config, the dataset or the directory cannot be used.
      RunError: training diverged, or a file could not be written.
    """
    started = time.perf_counter() if started is None else started
    config_lib.check_config(config)
    if run_dir.read_finished(directory, config):
        return True
    mesh = devices.make_mesh()  # refuses a backend that is not there
    devices.check_batch(config, mesh)
    is_first = distributed.is_first()
    splits = datasets.load(config)
    with run_dir.claim(directory) if is_first else contextlib.nullcontext():
        if is_first:
            if finished := run_dir.read_finished(directory, config):  # another process may have come first
                terminal.print_summary(finished, console)
                return True
            if earlier := run_dir.extend(directory, config):
                console.print(
                    f"going on from {earlier} to {config.num_epochs} epochs; results so far are kept in "
                    f"after_{earlier}_epochs, and the test split is scored again at the end"
                )
            run_dir.write_config(directory, config, devices.describe(mesh))
        num_classes = len(datasets.CLASS_NAMES[config.dataset])
        result = loop.fit(config, splits, num_classes, directory, mesh, stop, console)
        if result.finished and score:
            finalize.finalize_training(config, splits, result, directory, mesh, started, console)
    return result.finished
