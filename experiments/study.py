"""Searches a space of hyperparameters, on one core or on many machines; stopped and started again at will.

    python -m experiments.study --config=configs/studies/adam.py --trials=64 [--sampler=tpe] [--rounds=3]
    python -m experiments.study confirm STUDY --seeds=10
    python -m experiments.report STUDY

The same command goes on with a study, or joins it as one more worker.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mnist_flax.experiments.research import extra
from mnist_flax.runtime import cli, config_flag

_CONFIG, _ARGUMENTS = config_flag.define_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "study directory; by default runs/studies/<config name>.")
_STORAGE = flags.DEFINE_string(
    "storage", None, "database: sqlite:///PATH, by default in the study directory, or postgresql://USER@HOST/DATABASE."
)
_TRIALS = flags.DEFINE_integer("trials", None, "size that the study grows to; by default a sweep's, else 64.", 1)
_POPULATION = flags.DEFINE_integer("population", 16, "most models that a worker trains at once.", 1)
_SAMPLER = flags.DEFINE_enum("sampler", None, ["quasirandom", "tpe", "cmaes"], "by default the plan's.")
_ROUNDS = flags.DEFINE_integer("rounds", None, "rounds of successive halving; by default the plan's.", 1, 6)
_REPEATS = flags.DEFINE_integer("repeats", None, "seeds of every trial; by default the plan's, else 1.", 1, 1_000)
_HEARTBEAT = flags.DEFINE_integer("heartbeat", 10, "seconds between a running trial's signs of life.", 1)
_SEEDS = flags.DEFINE_integer("seeds", 10, "confirm: fresh seeds that winner and baseline are trained with.", 2)


def load_module(path: str) -> Any:
    """The config file as a module."""
    spec = importlib.util.spec_from_file_location("study_config", path)
    assert spec and spec.loader  # `define_flag` has seen that it is named as a Python file is
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_config"] = module
    spec.loader.exec_module(module)
    return module


def search(stop: cli.Stop) -> None:
    """Works on the study of `--config` until it has all its trials."""
    import optuna

    from mnist_flax.experiments.research import confirm, directory, members, space, storage, worker

    path = config_flag.recipe_path()
    definition = space.define(load_module(path), _CONFIG.value, _REPEATS.value)
    place = Path(_WORKDIR.value or Path("runs") / "studies" / Path(path).stem)
    print(place, flush=True)
    members.use_all_cores()
    programs = members.Programs.load(definition.config)
    members.make_member(definition.trial_config({}), programs.splits)  # fits the data, or nothing is written
    record = directory.prepare(place, definition, _STORAGE.value)
    database = storage.connect(record.storage, _HEARTBEAT.value)
    study = worker.join(record.name, definition, database, place)
    stop.can_wait = True
    done = worker.Worker(
        study,
        database,
        definition,
        programs,
        trials=_TRIALS.value or len(definition.sweep) or 64,
        population=_POPULATION.value,
        sampler=_SAMPLER.value or definition.plan.sampler,
        rounds=_ROUNDS.value or definition.plan.rounds,
        test=False,
        stop=stop,
    ).run()
    if study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        confirm.write_winner(place, study, definition.config)
    elif done:
        raise cli.RunError(
            f"no trial of {place} came to a result: all failed or diverged; use another --workdir for another space"
        )


def main(argv: list[str]) -> int:
    extra.require("optuna")
    from mnist_flax.experiments.research import confirm, storage

    confirming = argv[1:2] == ["confirm"]
    others = ("config", "workdir", "storage", "trials", "sampler", "rounds", "repeats") if confirming else ("seeds",)
    if given := [name for name in others if flags.FLAGS[name].present]:
        raise cli.UserError(f"--{given[0]} is a flag of {'a search' if confirming else 'confirm'} alone: leave it out")
    stop = cli.Stop()
    try:
        match argv[1:]:
            case []:
                search(stop)
            case ["confirm", place]:
                stop.can_wait = True
                confirm.run_confirmation(Path(place), _SEEDS.value, _POPULATION.value, _HEARTBEAT.value, stop)
            case _:
                raise cli.UserError(
                    f"{shlex.join(argv[1:])}: name a --config=FILE, "
                    "or: python -m mnist_flax.experiments.study confirm STUDY"
                )
    except KeyboardInterrupt:
        pass
    except storage.FAILURES as error:
        said = cli.reason(getattr(error, "orig", None) or error)
        raise cli.RunError(f"the study's storage failed ({said}); this command goes on where it was") from error
    if stop():
        again = shlex.join(["python", "-m", "mnist_flax.experiments.study", *sys.argv[1:]])
        print(f"stopped; this command goes on from here:\n{again}")
    return 0


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
