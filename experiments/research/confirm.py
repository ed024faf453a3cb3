"""What a study found, put to the test: winner and baseline under fresh seeds, each scored once on the test split."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from ml_collections import ConfigDict

from mnist_flax.experiments.research import directory, members, outputs, space, storage, worker
from mnist_flax.experiments.summarize import summary_stats
from mnist_flax.runtime import cli, files, run_dir, terminal
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.cli import UserError

FRESH = 1_000_000  # first seed of a confirmation: no search uses it


def best_trial(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """Raises UserError if no trial is complete."""
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not complete:
        raise UserError("the study has no complete trial yet: run its study command")
    return min(complete, key=lambda trial: (trial.value, trial.number))


def restored(config: ConfigDict, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as they were before they went through JSON, which knows no tuples."""
    reference = config_lib.flatten(config)
    return {k: tuple(v) if isinstance(reference[k], tuple) else v for k, v in fields.items()}


def write_winner(place: Path, study: optuna.Study, config: ConfigDict) -> Path:
    """Writes the best trial's config as `winner.py`, which `mnist_flax.main --config=` runs."""
    trial = best_trial(study)
    # The trial recorded the values of fields that refer to others, too.
    won = members.with_fields(config.copy_and_resolve_references(), restored(config, trial.user_attrs["config"]))
    fields = {
        key: value
        for key, value in space.changed(config_lib.default_config(), won).items()
        if key not in ("data_dir", "archive_dir")
    }
    lines = "".join(f"    config.{key} = {value!r}\n" for key, value in fields.items())
    path = place / "winner.py"
    # The study's name and the path come with the directory, and this file is run: they stand in comments, a line each.
    heading = f"Winner of the study {study.study_name}: trial {trial.number}, {trial.value:.6g} on validation data."
    comments = "".join(f"# {cli.one_line(line)}\n" for line in (heading, training_command(path)))
    code = (
        f"{comments}\n"
        "from mnist_flax.configs import default\n\n\n"
        f"def get_config():\n    config = default.get_config()\n{lines}    return config\n"
    )
    files.write(path, code.encode())
    return path


def training_command(recipe: Path) -> str:
    """The command that trains a recipe. A colon in `--config` ends the path: such a recipe is copied first."""
    train = ("python", "-m", "mnist_flax.main")
    if ":" not in str(recipe):
        return outputs.command(*train, f"--config={recipe}")
    return (
        f"{outputs.command('cp', '--', str(recipe), recipe.name)} && {shlex.join([*train, f'--config={recipe.name}'])}"
    )


def run_confirmation(place: Path, seeds: int, population: int, heartbeat: int, stop: Callable[[], bool]) -> None:
    """Trains winner and baseline (the study's config as it stands) with the same fresh seeds, and compares them.

    A study of its own, in the same storage: it is stopped, resumed and shared like the search. Where the two are the
    same but for their seed, nothing is trained or written, and a line says so.
    """
    record = directory.read(place)
    database = storage.connect(record.storage, heartbeat)
    study = directory.open_study(record, database)
    trial = best_trial(study)
    baseline = restored(record.config, study.user_attrs["baseline"])
    won = restored(record.config, trial.user_attrs["config"])
    if {**won, "seed": 0} == {**baseline, "seed": 0}:
        print(f"the winner, trial {trial.number}, is the baseline: there is nothing to compare")
        return
    fresh = range(FRESH, FRESH + seeds)
    sweep = [{**fields, "seed": seed} for seed in fresh for fields in (won, baseline)]
    # A range of seeds, not a choice: their number may grow.
    ranges = {**space.sweep_space(sweep), "seed": space.integer(FRESH, 2 * FRESH)}
    plan = replace(record.plan, repeats=1)
    definition = space.Definition(record.config, ranges, sweep, plan)
    members.use_all_cores()
    programs = members.Programs.load(record.config)
    path = write_winner(place, study, record.config)
    name = f"{record.name}, confirmation of trial {trial.number}"
    repeats = worker.join(name, definition, database, place)
    done = worker.Worker(
        repeats,
        database,
        definition,
        programs,
        trials=len(sweep),
        population=population,
        sampler="quasirandom",
        rounds=1,
        test=True,
        stop=stop,
    ).run()
    if not done:
        return
    results = compare(repeats, {"winner": won, "baseline": baseline}, fresh, record.config)
    run_dir.write_json(
        place / "confirmation.json", {"trial": trial.number, "objective": record.plan.objective, **results}
    )
    print_comparison(results, record.plan.objective)
    print(f"written: {place / 'confirmation.json'} and {path}")


def compare(
    study: optuna.Study, fields_of: Mapping[str, Mapping[str, Any]], seeds: range, config: ConfigDict
) -> dict[str, Any]:
    """Scores of both configs by seed, and their paired difference (winner less baseline) with its interval.

    Raises:
      UserError: fewer than two seeds gave a pair.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {role: {} for role in fields_of}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        fields = restored(config, trial.user_attrs["config"])
        seed, value = fields.pop("seed"), trial.value
        assert value is not None  # it is complete
        for role, wanted in fields_of.items():
            if fields == {key: value for key, value in wanted.items() if key != "seed"}:
                found[role][seed] = (trial.user_attrs["test_accuracy"], value)
    pairs = [seed for seed in seeds if all(seed in scores for scores in found.values())]
    if len(pairs) < 2:
        raise UserError("fewer than two seeds trained to their end under both configs: nothing can be compared")
    results: dict[str, Any] = {"seeds": pairs}
    for place, name in enumerate(("test_accuracy", "objective_value")):
        columns = {role: [scores[seed][place] for seed in pairs] for role, scores in found.items()}
        columns["difference"] = [a - b for a, b in zip(columns["winner"], columns["baseline"], strict=True)]
        results[name] = {role: summary_stats(values) for role, values in columns.items()}
    return results


def print_comparison(results: Mapping[str, Any], objective: str) -> None:
    title = f"{len(results['seeds'])} fresh seeds; +- is half the 95 % interval of the mean"
    table = terminal.table("", "mean", "+-", "deviation", title=title)
    for key, name, form in (("test_accuracy", "test accuracy", "{:.3%}"), ("objective_value", objective, "{:.5g}")):
        for role in ("winner", "baseline", "difference"):
            score = results[key][role]
            cells = (form.format(score[field]) for field in ("mean", "half_interval", "deviation"))
            table.add_row(f"{name}, {role}", *cells)
        table.add_section()
    terminal.console.print(table)
