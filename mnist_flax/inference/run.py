"""A trained run, read back from its directory."""

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mnist_flax.runtime import cli, run_dir
from mnist_flax.runtime.cli import UserError


class Run(NamedTuple):
    """A trained model, read back from its run directory, or an ensemble of such models."""

    directory: Path
    config: ConfigDict  # of an ensemble, that of its first member
    model: Any  # mnist_flax.models.cnn.CNN or Ensemble
    variables: dict  # {"params", "batch_stats"}: what model.apply takes
    class_names: tuple[str, ...]
    members: tuple[ConfigDict, ...] = ()  # of an ensemble


def load_run(directory: Path | str, which: str | None = None) -> Run:
    """The model of a run, from its `last` or `best` checkpoint; by default the one that the config selects.

    Also that of an ensemble, which has one checkpoint.

    Raises:
      UserError: there is no such run, or no such checkpoint.
      RunError: its checkpoint cannot be read.
    """
    cli.check_path(str(directory), directory)
    directory = Path(directory)
    config, members = run_dir.read_config(directory), run_dir.read_members(directory)
    if not (directory / run_dir.CHECKPOINTS).is_dir():
        ways = "run its command again" if members else "let the run finish an epoch"
        raise UserError(f"{directory} has no checkpoint yet: {ways}")
    if members and which:
        raise UserError(f"{directory} is an ensemble, whose members were chosen when it was made: choose no checkpoint")
    from mnist_flax.data import datasets  # commands refuse what they can before JAX is imported
    from mnist_flax.runtime import devices
    from mnist_flax.training import checkpoint
    from mnist_flax.training.state import abstract_state, abstract_variables, make_network

    names, mesh = datasets.CLASS_NAMES[config.dataset], devices.make_mesh()
    configs = tuple(member["config"] for member in members)
    network = make_network(configs or (config,), len(names))
    if members:
        variables, _ = checkpoint.load(directory / run_dir.CHECKPOINTS, "last", abstract_variables(network, mesh))
    else:
        abstract = abstract_state(config, len(names), mesh)
        state, _ = checkpoint.load(directory / run_dir.CHECKPOINTS, which or config.checkpoint.select, abstract)
        variables = state.variables()
    return Run(directory, config, network, variables, names, configs)
