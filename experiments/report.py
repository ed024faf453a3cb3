"""The report of a study: `python -m experiments.report STUDY` writes report.html, one file, and figures/*.png."""

from __future__ import annotations  # Optuna's types without its import

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_flax.evaluation import html, report
from mnist_flax.experiments.research import extra, outputs, study_axes, study_figures
from mnist_flax.experiments.research.study_axes import Axis, Trial
from mnist_flax.runtime import cli, files, terminal

if TYPE_CHECKING:
    import optuna

    from mnist_flax.experiments.research import directory

EDGE = 0.05  # of a range, at either end: a best trial there says that the range is too narrow
IMPORTANCE_TRIALS = 8  # complete trials, at least, for a forest to mean anything
CAPTIONS = {
    "scientific": "What the study asks about. Left, all trials by the scientific hyperparameter, a bar at the best; "
    "then against every other range; an arrow with a number is a value above the axis. "
    "Where a range is a choice of few, means over the trials in which all other such "
    "choices have their most frequent value.",
    "isolation": "Isolation plots: every trial against one hyperparameter at a time. Infeasible trials lie along the "
    "top; an arrow with a number is a value above the axis; dotted lines are the ends of a range; the best trial is "
    "ringed.",
    "importance": "How much of the variance of the objective each hyperparameter explains by itself (fANOVA, Hutter et "
    "al. 2014; mean and deviation over ten forests), over complete trials and hyperparameters that all of them have.",
    "parallel": "Every complete trial as one line; the five best in colour. A broken line leaves out a range that does "
    "not apply.",
    "curves": "Validation error of the best trials while they trained; all others in grey.",
    "budget": "What more trials bought. The band is study variance: the best of as many trials, drawn from these with "
    "replacement, 2,000 times.",
    "seeds": "Seed variance, apart from the search: the same two configs under fresh seeds, joined by seed, scored "
    "once each on the test split; right, the paired difference with its 95 % interval.",
}


def read_trials(study: optuna.Study, objective: str) -> list[Trial]:
    """The trials of a study that ran, to their end or not."""
    from optuna.trial import TrialState

    trials: list[Trial] = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        last = next(reversed(trial.intermediate_values.values()), math.inf)
        value = last if trial.value is None else trial.value
        made = partial(Trial, trial.number, trial.params, curve=trial.user_attrs.get("curve", []))
        if trial.state == TrialState.COMPLETE:
            trials.append(made(outcome="complete", value=value))
        elif "diverged_at_step" in trial.user_attrs:
            trials.append(made(outcome="diverged", value=math.inf))
        else:
            # Epochs to a target are not known before the end; a stopped trial was compared by its error.
            trials.append(made(outcome="stopped", value=math.inf if objective == "epochs_to_target" else value))
    return trials


def edge_warnings(best: Trial, axes_of: Sequence[Axis]) -> list[str]:
    """A sentence for each range at whose end the best trial lies."""
    found = []
    for axis in axes_of:
        names = any(isinstance(tick, bool | str) for tick in axis.ticks)
        if axis.key not in best.params or names or len(axis.ticks) in (1, 2):
            continue
        if best.params[axis.key] == 0:
            continue  # off: nothing lies beyond
        share = axis.share(best.params[axis.key])
        if share <= EDGE or share >= 1 - EDGE:
            end = "lower" if share <= EDGE else "upper"
            value = study_axes.number(best.params[axis.key])
            found.append(f"The best trial lies at the {end} end of the range of {axis.key} ({value}): widen it there.")
    return found


def importances(study: optuna.Study, forests: int = 10) -> dict[str, tuple[float, float]]:
    """Mean and deviation of fANOVA's main effects over several forests; empty where there is too little to go by."""
    import numpy as np
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = [trial.value or 0.0 for trial in complete]
    if len(complete) < IMPORTANCE_TRIALS or max(values) == min(values):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = [get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=i)) for i in range(forests)]
    keys = sorted(drawn[0], key=lambda key: -np.mean([d[key] for d in drawn]))
    return {key: (float(np.mean([d[key] for d in drawn])), float(np.std([d[key] for d in drawn]))) for key in keys}


def write(place: Path) -> Path:
    """Writes the report into a study directory.

    Raises:
      UserError: it is no study, or no trial of it is complete.
    """
    from mnist_flax.experiments.research import confirm, directory, storage

    record = directory.read(place)
    study = directory.open_study(record, storage.connect(record.storage, heartbeat=60))
    best = confirm.best_trial(study)
    objective = record.plan.objective
    trials = read_trials(study, objective)
    axes_of = [study_axes.make_axis(key, scale) for key, scale in record.scales.items()]
    shown = [axis for axis in axes_of if axis.key != "seed"] or axes_of
    confirmation = directory.read_confirmation(place)
    drawn = {}
    by_key = {axis.key: axis for axis in shown}
    asked = [by_key[key] for key in record.plan.scientific if key in by_key and len(by_key[key].ticks) >= 2]
    if asked:
        rest = [axis for axis in shown if axis is not asked[0]]
        drawn["scientific"] = study_figures.figure_scientific(trials, asked[0], rest, objective)
    drawn["isolation"] = study_figures.figure_isolation(trials, shown, objective)
    drawn["parallel"] = study_figures.figure_parallel(trials, shown, objective)
    importance = importances(study)
    if importance:
        drawn["importance"] = study_figures.figure_importance(importance)
    drawn["curves"] = study_figures.figure_curves(trials)
    if len(trials) > 1:
        drawn["budget"] = study_figures.figure_budget(trials, objective)
    if confirmation:
        drawn["seeds"] = study_figures.figure_seeds(confirmation)
    pictures = report.save_figures(place, drawn)
    failed = [trial for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs]
    notes = edge_warnings(next(t for t in trials if t.number == best.number), shown)
    if not confirmation:
        confirming = outputs.command(
            "python", "-m", "mnist_flax.experiments.study", "confirm", str(place), "--seeds=10"
        )
        notes.append(f"Nothing is confirmed yet: the best of many trials looks better than it is. Run: {confirming}")
    path = place / "report.html"
    text = page(record, trials, failed, notes, confirmation, pictures)
    files.write(path, text.encode(errors="backslashreplace"))
    return path


def page(
    record: directory.StudyRecord,
    trials: Sequence[Trial],
    failed: Sequence[optuna.trial.FrozenTrial],
    notes: Sequence[str],
    confirmation: Mapping[str, Any] | None,
    pictures: Mapping[str, bytes],
) -> str:
    """The report as HTML; `pictures` are PNG files by the names in `CAPTIONS`."""
    plan = record.plan
    complete = study_axes.ranked(trials)
    diverged, early = (sum(t.outcome == outcome for t in trials) for outcome in ("diverged", "stopped"))
    best = complete[0]
    objective = plan.objective.replace("_", " ")
    tiles = [
        (f"best {objective}", shown_value(plan.objective, best.value), f"trial {best.number}"),
        ("trials", f"{len(trials) + len(failed)}", f"{len(complete)} complete, {early} stopped early"),
        ("infeasible", f"{diverged}", f"diverged; {len(failed)} failed"),
        ("ranges", f"{len(record.scales)}", f"{len(plan.scientific)} scientific"),
    ]
    if confirmation:
        scores = confirmation["test_accuracy"]
        gap = scores["difference"]
        note = f"winner over baseline, {len(confirmation['seeds'])} seeds"
        tiles.append(("test accuracy", terminal.percent(scores["winner"]["mean"]), "winner, mean over fresh seeds"))
        tiles.append(("difference", f"{100 * gap['mean']:+.2f} +- {100 * gap['half_interval']:.2f}", f"points, {note}"))
    failures = [f"Trial {trial.number} failed: {trial.user_attrs['error']}" for trial in failed[:5]]
    rows = [
        (
            str(trial.number),
            shown_value(plan.objective, trial.value),
            *(study_axes.number(trial.params[key]) if key in trial.params else "" for key in record.scales),
        )
        for trial in complete[:10]
    ]
    ranges = [
        (key, scale["kind"].replace("_", "-"), _span(scale), "scientific" if key in plan.scientific else "nuisance")
        for key, scale in record.scales.items()
    ]
    return html.render(
        Path(__file__).with_name("study.html.jinja"),
        name=record.name,
        heading=plan.question or f"Study {record.name}",
        dataset=record.config.dataset,
        objective=objective,
        repeats=plan.repeats,
        tiles=tiles,
        notes=[*notes, *failures],
        pictures=pictures,
        captions=CAPTIONS,
        best_trials=rows,
        best_trials_head=("trial", objective, *map(study_axes.short, record.scales)),
        ranges=ranges,
    )


def shown_value(objective: str, value: float) -> str:
    return terminal.percent(value) if objective == "validation_error" else f"{value:.4g}"


def _span(scale: Mapping[str, Any]) -> str:
    if scale["kind"] != "choice":
        span = f"{scale['low']:g} to {scale['high']:g}"
    else:
        values = scale["values"]
        listed = ", ".join(study_axes.number(value) for value in values)
        numbers = all(isinstance(value, int | float) for value in values)
        many = numbers and len(values) > 2 * study_axes.FEW
        span = f"{len(values)} values from {min(values):.3g} to {max(values):.3g}" if many else listed
    condition = scale["condition"]
    return span + (f", where {condition[0]} is {' or '.join(map(str, condition[1]))}" if condition else "")


def main(argv: list[str]) -> None:
    extra.require("optuna")
    if len(argv) != 2:
        raise cli.UserError("name one study directory: python -m mnist_flax.experiments.report STUDY")
    print(f"written: {write(Path(argv[1]))}")


if __name__ == "__main__":
    cli.run(main)
