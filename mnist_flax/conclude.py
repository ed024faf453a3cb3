"""The end of a run: the selected model is scored, the test set once; then report and summary are written."""

import time
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mnist_flax import (
    checkpoint,
    cli,
    data,
    devices,
    evaluate,
    hosts,
    metrics,
    model,
    progress,
    report,
    run,
    train,
)
from mnist_flax.loop import Result


def conclude(config: ConfigDict, splits: data.Splits, result: Result, directory: Path, mesh: Mesh) -> None:
    """Scores the model, the test split first; writes figures, report and, last of all, summary.json, and prints it.

    Of several processes all score, and the first one writes.
    """
    names = data.CLASS_NAMES[config.dataset]
    state = result.state
    if config.checkpoint.select == "best":
        abstract = train.abstract_state(config, len(names), mesh)
        state, _ = checkpoint.load(directory / run.CHECKPOINTS, "best", abstract)
    network = model.make_model(config.model, train.hyperparameters(config), len(names))
    evaluation = train.make_evaluate(network, mesh)

    def split_logits(split: data.Split):
        return evaluate.split_logits(evaluation, state.variables(), split, config.eval_batch_size, mesh)

    test_logits = split_logits(splits.test)
    if not np.isfinite(test_logits).all():
        raise cli.RunError(
            "the network gives NaN or infinite logits for test images: train with a lower "
            "config.optimizer.learning_rate, in another directory"
        )
    test = metrics.evaluate_logits(test_logits, splits.test.labels)
    seconds = result.earlier_seconds + time.perf_counter() - cli.STARTED
    progress.console.print(
        f"test accuracy {test['accuracy']:.2%} ({test['errors']} errors in {test['examples']:,}) after {seconds:.1f} s"
    )
    accuracy = {
        name: metrics.evaluate_logits(split_logits(split), split.labels)["accuracy"] if len(split.labels) else None
        for name, split in (("train", splits.train), ("validation", splits.validation))
    }
    if not hosts.is_first():
        return

    device = devices.describe(mesh)
    examples = len(splits.train.labels) // config.batch_size * config.batch_size * result.records[-1]["epoch"]
    summary = {
        "dataset": config.dataset,
        "seed": config.seed,
        "parameters": result.parameters,
        "steps": int(result.state.step),
        "epochs": result.records[-1]["epoch"],
        "train_accuracy": accuracy["train"],
        "validation_accuracy": accuracy["validation"],
        "test_accuracy": test["accuracy"],
        "test_loss": test["negative_log_likelihood"],
        "test_errors": test["errors"],
        "train_seconds": result.train_seconds,
        "test_seconds": seconds,
        "total_seconds": seconds,
        "compile_seconds": result.compile_seconds,
        "images_per_second": examples / result.train_seconds,
        "device": f"{device['count']} x {device['kind']}",
    }
    which = {"dataset": config.dataset, "split": "test", "checkpoint": config.checkpoint.select}
    run.write_json(directory / "evaluation_test.json", which | test)
    report.write(
        directory,
        summary=summary,
        images=splits.test.images,
        labels=splits.test.labels,
        logits=test_logits,
        kernel=model.first_kernel(state.variables()),
        class_names=names,
    )
    summary["total_seconds"] = result.earlier_seconds + time.perf_counter() - cli.STARTED
    run.write_json(directory / "summary.json", summary)
    progress.print_summary(summary)
