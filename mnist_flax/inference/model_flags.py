"""The flags that say which model a command uses: `--checkpoint`, and `--data_dir` where its dataset has moved."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mnist_flax.inference.run import Run, load_run

_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["last", "best"], "which checkpoint; by default the one that the run's config selects."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where the dataset is, if it moved since the run.")


def load(directory: Path | str) -> Run:
    """The run that a command names, as the flags say. Raises what `load_run` does."""
    trained = load_run(directory, _CHECKPOINT.value)
    if _DATA_DIR.value:
        trained.config.data_dir = _DATA_DIR.value
    return trained


def checkpoint(config: ConfigDict) -> str:
    """Which checkpoint of a run of this config `load` takes."""
    return _CHECKPOINT.value or config.checkpoint.select
