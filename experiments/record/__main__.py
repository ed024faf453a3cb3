"""Trains a recipe and a reference over many seeds, then scores them all: `python -m experiments.record`.

    python -m experiments.record [--seeds=5] [--processes=2] [--views=16] [--workdir=DIR] [-- --config.KEY=VALUE ...]

Every run is `mnist_flax.main` with its own seed, trained without a look at the test set. Only when the last one has
trained are they scored, averaged to ensembles, and compared by McNemar's test. Stop the command as you like and give it
again: finished runs stay, interrupted ones go on. What follows `--` goes to every training command.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from mnist_flax.experiments.record import results, runs
from mnist_flax.runtime import cli, config_flag, run_dir
from mnist_flax.runtime import config as config_lib

_SEEDS = flags.DEFINE_integer("seeds", 5, "runs of each recipe, with seeds 0, 1, ...", lower_bound=2)
_ENSEMBLE = flags.DEFINE_integer("ensemble", 5, "members of an ensemble", lower_bound=2)
_VIEWS = flags.DEFINE_integer(
    "views", 1, "score the recipe with the mean over this many moved copies of each image, too", lower_bound=1
)
_PROCESSES = flags.DEFINE_integer("processes", 1, "trainings at once, each on its share of the cores", lower_bound=1)
_CONFIG = flags.DEFINE_string("config", "configs/record.py", "the recipe whose claim it is")
_REFERENCE = flags.DEFINE_string("reference", "configs/default.py", "the recipe that it is compared with")
_WORKDIR = flags.DEFINE_string("workdir", "runs/record", "directory of all runs and of the results")


def resolve(recipe: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a recipe with --config.KEY=VALUE; raises UserError, or ends the process, where there is none."""
    for name in [name for name in flags.FLAGS if name.partition(".")[0] == "config"]:
        delattr(flags.FLAGS, name)  # or there could be no second one
    holder, arguments = config_flag.define_flag(["record", f"--config={recipe}", *overrides])
    with cli.flag_errors():
        flags.FLAGS(arguments)
    config = holder.value
    config_lib.check_config(config)
    return config


def main(argv: list[str]) -> int:
    if bad := [argument for argument in argv[1:] if not argument.startswith("--config.")]:
        raise cli.UserError(
            f"{bad[0]!r} is no flag: see --help; fields of the config go after --, as --config.KEY=VALUE"
        )
    recipe, reference = _CONFIG.value, _REFERENCE.value
    if _ENSEMBLE.value > _SEEDS.value:
        raise cli.UserError(f"--ensemble={_ENSEMBLE.value} takes at least as many seeds: --seeds={_ENSEMBLE.value}")
    if Path(recipe).stem == Path(reference).stem:
        raise cli.UserError(
            f"--config={recipe} and --reference={reference} would be trained in one directory: "
            "name two recipes of different names"
        )
    configs = {path: resolve(path, argv[1:]) for path in (recipe, reference)}
    if len(datasets := {config.dataset for config in configs.values()}) > 1:
        raise cli.UserError(f"the recipes are of different datasets ({', '.join(sorted(datasets))}): name two of one")
    if _VIEWS.value > 1:
        from mnist_flax.inference import tta
        from mnist_flax.training.state import make_network

        config = configs[recipe]
        tta.make_tta(make_network([config], 10), config, _VIEWS.value)  # refuses a recipe that moves no image
    place = Path(_WORKDIR.value)
    trainings, references = (
        [
            runs.Training(path, seed, place / Path(path).stem / str(seed), tuple(argv[1:]), config.num_epochs)
            for seed in range(_SEEDS.value)
        ]
        for path, config in configs.items()
    )
    for training in (*trainings, *references):  # a finished one is not trained again, and would not be asked
        configs[training.recipe].seed = training.seed
        run_dir.check_directory(training.directory, configs[training.recipe])
    farewell = "stopped; the same command goes on from here"
    stop = cli.Stop(farewell)
    stop.can_wait = True
    for stage in ("train", "score"):
        if not runs.complete([*trainings, *references], stage, _PROCESSES.value, stop):
            print(farewell)
            return 0
    stop.can_wait = False  # nothing asks `stop` from here on
    print("all are scored; comparing them", flush=True)
    results.write(place, trainings, references, _ENSEMBLE.value, _VIEWS.value)
    return 0


if __name__ == "__main__":
    cli.run(main)
