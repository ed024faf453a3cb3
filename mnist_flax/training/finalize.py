"""The end of a run: its model is scored, the test set once; then report and summary are written."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from mnist_flax.data import datasets
from mnist_flax.evaluation import metrics, report
from mnist_flax.models import cnn
from mnist_flax.runtime import cli, devices, distributed, run_dir, terminal
from mnist_flax.runtime.settings import pinned
from mnist_flax.training import checkpoint, scoring
from mnist_flax.training.loop import Result
from mnist_flax.training.state import abstract_state, hyperparameters


@pinned()
def finalize_training(
    config: ConfigDict,
    splits: datasets.Splits,
    result: Result,
    directory: Path,
    mesh: Mesh,
    started: float,
    console: Console,
) -> None:
    """`finalize` of the model that `config.checkpoint.select` names; prints the summary."""
    num_classes = len(datasets.CLASS_NAMES[config.dataset])
    state = result.state
    if config.checkpoint.select == "best":
        abstract = abstract_state(config, num_classes, mesh)
        state, _ = checkpoint.load(directory / run_dir.CHECKPOINTS, "best", abstract)
    network = cnn.make_model(config.model, hyperparameters(config), num_classes)
    steps = int(result.state.step)
    about = {
        "seed": config.seed,
        "parameters": result.parameters,
        "steps": steps,
        "epochs": result.records[-1]["epoch"],
        "train_seconds": result.train_seconds,
        "compile_seconds": result.compile_seconds,
        "images_per_second": steps * config.batch_size / result.train_seconds,
    }
    if earlier := run_dir.test_scorings(directory):
        about["test_scorings"] = earlier + 1
    started -= result.earlier_seconds
    summary = finalize(network, state.variables(), config, splits, directory, mesh, about, started, console)
    if distributed.is_first():
        terminal.print_summary(summary, console)


@pinned()
def finalize(
    network: cnn.CNN | cnn.Ensemble,
    variables: dict[str, Any],
    config: ConfigDict,
    splits: datasets.Splits,
    directory: Path,
    mesh: Mesh,
    about: Mapping[str, Any],
    started: float,
    console: Console,
    also: Sequence[str] = ("train", "validation"),
) -> dict[str, Any]:
    """Scores a network, the test split first; writes figures, report and, last of all, summary.json, which it gives.

    `about` is what the summary says besides. Of several processes all score, and the first one writes.

    Args:
      started: `time.perf_counter()` when work on the model began, less the seconds that earlier processes spent.
      also: splits beside the test split that are scored for the summary.

    Raises:
      RunError: logits of test images are not finite.
    """
    logits_of = scoring.make_logits(network, config.eval_batch_size, mesh)
    test_logits = logits_of(variables, splits.test)
    if not np.isfinite(test_logits).all():
        raise cli.RunError(
            "the network gives NaN or infinite logits for test images: train with a lower "
            "config.optimizer.learning_rate, in another directory"
        )
    test = metrics.evaluate_logits(test_logits, splits.test.labels)
    test_seconds = time.perf_counter() - started
    shown = f"test accuracy {test['accuracy']:.2%} ({test['errors']} errors in {test['examples']:,})"
    console.print(f"{shown} after {test_seconds:.1f} s")
    accuracy = {
        name: metrics.evaluate_logits(logits_of(variables, split), split.labels)["accuracy"]
        for name in also
        if len((split := getattr(splits, name)).labels)
    }
    device, class_names = devices.describe(mesh), datasets.CLASS_NAMES[config.dataset]
    summary = {
        "dataset": config.dataset,
        **about,
        "train_accuracy": accuracy.get("train"),
        "validation_accuracy": accuracy.get("validation"),
        "test_accuracy": test["accuracy"],
        "test_loss": test["negative_log_likelihood"],
        "test_errors": test["errors"],
        "test_seconds": test_seconds,
        "device": f"{device['count']} x {device['kind']}",
    }
    if not distributed.is_first():
        return summary
    which = {"dataset": config.dataset, "split": "test", "checkpoint": config.checkpoint.select}
    run_dir.write_json(directory / "evaluation_test.json", which | test)
    pictures = report.draw(
        directory, splits.test.images, splits.test.labels, test_logits, cnn.first_kernel(variables), class_names
    )
    summary["total_seconds"] = time.perf_counter() - started
    report.write(directory, summary, test, class_names, pictures)
    run_dir.write_json(directory / "summary.json", summary)
    return summary
