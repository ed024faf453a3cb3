"""What the runs of a record say: a table of seeds, its mean and interval, and McNemar's test against the reference."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mnist_flax.evaluation import metrics
from mnist_flax.experiments.record.runs import Training
from mnist_flax.experiments.summarize import summary_stats
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import files, run_dir, terminal
from mnist_flax.runtime.cli import RunError

Correct = Bool[np.ndarray, " examples"]


def mcnemar(first: Correct, second: Correct) -> dict[str, Any]:
    """McNemar's exact test (McNemar 1947; Dietterich 1998) of two classifiers on the same examples.

    `only_first` and `only_second` count examples that just one of them gets right. `p_value` is two-sided: how likely
    so uneven a split, or a more uneven one, is if both have the same error rate.
    """
    from scipy import stats

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p_value = float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def write(place: Path, recipe: Sequence[Training], reference: Sequence[Training], size: int, views: int) -> None:
    """Scores all runs together, prints the table, and writes results.json, results.md and an ensemble in `place`.

    Ends the process with status 2 where something else stands in the ensemble's place, all else being written.

    With more `views` than one, the recipe is scored with them too: see `mnist_flax.inference.tta`.

    Raises:
      UserError: its images were not moved in training, so there are no views.
      RunError: the ensemble cannot be made.
    """
    logits, labels = _test_logits(recipe)
    reference_logits, _ = _test_logits(reference)
    found = score(logits, reference_logits, labels, size)
    if views > 1:
        viewed, _ = _test_logits(recipe, views)
        found["views"] = views
        found["views_accuracy"] = summary_stats((viewed.argmax(-1) == labels).mean(1))
        found["views_ensemble_accuracy"] = summary_stats(metrics.ensemble_accuracies(viewed, labels, size))
    summaries = [_summary(training) for training in recipe]
    found["train_minutes"] = [summary["train_seconds"] / 60 for summary in summaries]
    found |= {"device": summaries[0]["device"], "dataset": summaries[0]["dataset"], "test_examples": len(labels)}
    names = [Path(each[0].recipe).stem for each in (recipe, reference)]
    run_dir.write_json(place / "results.json", {"recipe": names[0], "reference": names[1], **found})
    text = markdown(found, *names)
    files.write(place / "results.md", text.encode())
    terminal.console.print(text)
    terminal.console.print(f"written: {place / 'results.json'} and {place / 'results.md'}")
    members = [str(training.directory) for training in recipe[:size]]
    ensemble = place / f"{names[0]}_ensemble_{size}"
    command = [sys.executable, "-m", "mnist_flax.ensemble", *members, f"--workdir={ensemble}"]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status == 2:
        sys.exit(2)  # it has said what is wrong
    if status:
        raise RunError(f"the ensemble {ensemble} ended with status {status}: the same command makes it")
    terminal.console.print(f"written: the ensemble {ensemble}")


def score(
    logits: Float[np.ndarray, "runs examples classes"],
    reference_logits: Float[np.ndarray, "runs examples classes"],
    labels: Int[np.ndarray, " examples"],
    size: int,
) -> dict[str, Any]:
    """Accuracies of the runs of both recipes, of disjoint ensembles of `size`, and the tests between them.

    Runs are paired by their place. `ensemble_test` compares the first ensemble of each recipe, since the runs of one
    recipe err on the same examples and cannot be pooled in one test.
    """
    correct, reference_correct = (each.argmax(-1) == labels for each in (logits, reference_logits))
    accuracies, reference_accuracies = correct.mean(1), reference_correct.mean(1)
    first, reference_first = (
        metrics.ensemble_logits(each[:size]).argmax(-1) == labels for each in (logits, reference_logits)
    )
    return {
        "accuracy": summary_stats(accuracies),
        "reference_accuracy": summary_stats(reference_accuracies),
        "difference": summary_stats(accuracies - reference_accuracies),
        "tests": [mcnemar(*pair) for pair in zip(correct, reference_correct, strict=True)],
        "ensemble_size": size,
        "ensemble_accuracy": summary_stats(metrics.ensemble_accuracies(logits, labels, size)),
        "reference_ensemble_accuracy": summary_stats(metrics.ensemble_accuracies(reference_logits, labels, size)),
        "ensemble_test": mcnemar(first, reference_first),
    }


def markdown(found: dict[str, Any], recipe: str, reference: str) -> str:
    """The table of seeds, and what is said of them together."""
    views = found.get("views")
    names = ["seed", recipe, *([f"{views} views"] if views else []), reference]
    names += [f"only {recipe} right", f"only {reference} right", "p", "minutes"]
    rows = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    columns = (
        found["accuracy"]["values"],
        found["reference_accuracy"]["values"],
        found["tests"],
        found["train_minutes"],
    )
    for seed, (accuracy, other, test, minutes) in enumerate(zip(*columns, strict=True)):
        viewed = [f"{found['views_accuracy']['values'][seed]:.2%}"] if views else []
        cells = (f"{accuracy:.2%}", *viewed, f"{other:.2%}", *map(str, (test["only_first"], test["only_second"])))
        rows.append(f"| {seed} | {' | '.join(cells)} | {test['p_value']:.2g} | {minutes:.1f} |")
    size, test = found["ensemble_size"], found["ensemble_test"]
    lines = [
        f"{name}: {_said(found[key])}"
        for name, key in (
            (recipe, "accuracy"),
            (reference, "reference_accuracy"),
            ("difference", "difference"),
            (f"{recipe}, disjoint ensembles of {size}", "ensemble_accuracy"),
            (f"{reference}, disjoint ensembles of {size}", "reference_ensemble_accuracy"),
            (f"{recipe}, {views} views", "views_accuracy"),
            (f"{recipe}, {views} views, disjoint ensembles of {size}", "views_ensemble_accuracy"),
        )
        if key in found
    ]
    lines.append(
        f"McNemar's test of the first ensembles: {test['only_first']} digits that only {recipe} gets right, "
        f"{test['only_second']} that only {reference} does, p = {test['p_value']:.2g}"
    )
    about = f"Test accuracy on {found['dataset']} ({found['test_examples']:,} examples), {found['device']}:"
    return "\n".join([about, "", *rows, "", *(f"- {line}" for line in lines), ""])


def _said(scores: dict[str, Any]) -> str:
    count, mean = len(scores["values"]), f"{scores['mean']:.3%}"
    if count == 1:
        return f"{mean} (n = 1)"
    low, high = (scores["mean"] + sign * scores["half_interval"] for sign in (-1, 1))
    interval = f"95 % interval {low:.3%} to {high:.3%}"
    return f"mean {mean}, standard deviation {scores['deviation']:.3%}, {interval} (n = {count})"


def _test_logits(
    trainings: Sequence[Training], copies: int = 1
) -> tuple[Float[np.ndarray, "runs examples classes"], Any]:
    from mnist_flax.data import datasets
    from mnist_flax.inference import tta
    from mnist_flax.training import scoring

    logits = []
    test = datasets.load(run_dir.read_config(trainings[0].directory)).test
    for training in trainings:
        trained = load_run(training.directory)
        model = tta.make_tta(trained.model, trained.config, copies) if copies > 1 else trained.model
        logits.append(scoring.make_logits(model, trained.config.eval_batch_size)(trained.variables, test))
    return np.stack(logits), test.labels


def _summary(training: Training) -> dict[str, Any]:
    summary = run_dir.read_summary(training.directory)
    assert summary is not None  # `runs.complete` saw to that
    return summary
