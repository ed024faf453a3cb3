"""The end of a run: its model is scored, the test set once; then report and summary are written."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mnist_flax import report
from mnist_flax.data import datasets
from mnist_flax.evaluation import metrics
from mnist_flax.models import cnn
from mnist_flax.runtime import cli, devices, distributed, run_dir, terminal
from mnist_flax.runtime.settings import pinned
from mnist_flax.training import checkpoint, step
from mnist_flax.training.loop import Result


@pinned()
def conclude_training(config: ConfigDict, splits: datasets.Splits, result: Result, directory: Path, mesh: Mesh) -> None:
    """`finalize` of the model that `config.checkpoint.select` names; prints the summary."""
    num_classes = len(datasets.CLASS_NAMES[config.dataset])
    state = result.state
    if config.checkpoint.select == "best":
        abstract = step.abstract_state(config, num_classes, mesh)
        state, _ = checkpoint.load(directory / run_dir.CHECKPOINTS, "best", abstract)
    network = cnn.make_model(config.model, step.hyperparameters(config), num_classes)
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
    summary = conclude(
        network, state.variables(), config, splits, directory, mesh, about, earlier_seconds=result.earlier_seconds
    )
    if distributed.is_first():
        terminal.print_summary(summary)


@pinned()
def conclude(
    network: cnn.CNN | cnn.Ensemble,
    variables: dict[str, Any],
    config: ConfigDict,
    splits: datasets.Splits,
    directory: Path,
    mesh: Mesh,
    about: Mapping[str, Any],
    also: Sequence[str] = ("train", "validation"),
    earlier_seconds: float = 0.0,
) -> dict[str, Any]:
    """Scores a network, the test split first; writes figures, report and, last of all, summary.json, which it gives.

    `about` is what the summary says besides. Of several processes all score, and the first one writes.

    Args:
      also: splits beside the test split that are scored for the summary.
      earlier_seconds: that processes before this one spent on the model.

    Raises:
      RunError: logits of test images are not finite.
    """
    evaluation = step.make_evaluate(network, mesh)

    def split_logits(split: datasets.Split) -> np.ndarray:
        return step.split_logits(evaluation, variables, split, config.eval_batch_size, mesh)

    def seconds() -> float:
        return earlier_seconds + time.perf_counter() - cli.STARTED

    test_logits = split_logits(splits.test)
    if not np.isfinite(test_logits).all():
        raise cli.RunError(
            "the network gives NaN or infinite logits for test images: train with a lower "
            "config.optimizer.learning_rate, in another directory"
        )
    test = metrics.evaluate_logits(test_logits, splits.test.labels)
    test_seconds = seconds()
    shown = f"test accuracy {test['accuracy']:.2%} ({test['errors']} errors in {test['examples']:,})"
    terminal.console.print(f"{shown} after {test_seconds:.1f} s")
    accuracy = {
        name: metrics.evaluate_logits(split_logits(split), split.labels)["accuracy"]
        for name in also
        if len((split := getattr(splits, name)).labels)
    }
    device = devices.describe(mesh)
    summary = {
        "dataset": config.dataset,
        **about,
        "train_accuracy": accuracy.get("train"),
        "validation_accuracy": accuracy.get("validation"),
        "test_accuracy": test["accuracy"],
        "test_loss": test["negative_log_likelihood"],
        "test_errors": test["errors"],
        "test_seconds": test_seconds,
        "total_seconds": test_seconds,
        "device": f"{device['count']} x {device['kind']}",
    }
    if not distributed.is_first():
        return summary
    which = {"dataset": config.dataset, "split": "test", "checkpoint": config.checkpoint.select}
    run_dir.write_json(directory / "evaluation_test.json", which | test)
    report.write(
        directory,
        summary=summary,
        images=splits.test.images,
        labels=splits.test.labels,
        logits=test_logits,
        kernel=cnn.first_kernel(variables),
        class_names=datasets.CLASS_NAMES[config.dataset],
    )
    summary["total_seconds"] = seconds()
    run_dir.write_json(directory / "summary.json", summary)
    return summary
