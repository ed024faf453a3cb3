"""The end of a run: the selected model is scored, the test set once; then report and summary are written."""

import time
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mnist_flax import checkpoint, cli, data, devices, evaluate, metrics, model, progress, report, run, train
from mnist_flax.loop import Result


def conclude(config: ConfigDict, splits: data.Splits, result: Result, directory: Path, mesh: Mesh) -> dict:
    """Writes figures, report and, last of all, summary.json; gives and prints the summary."""
    names = data.CLASS_NAMES[config.dataset]
    state = result.state
    if config.checkpoint.select == "best":
        abstract = train.abstract_state(config, len(names), mesh)
        state, _ = checkpoint.load(directory / run.CHECKPOINTS, "best", abstract)
    network = model.make_model(config.model, train.hyperparameters(config), len(names))
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    together = data.Split(*(np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True)))  # compiles once
    logits = evaluate.split_logits(network, state.variables(), together, config.eval_batch_size, mesh)
    ends = np.cumsum([len(part.labels) for part in parts.values()])
    logits_of = dict(zip(parts, np.split(logits, ends[:-1]), strict=True))
    scores = {
        name: metrics.evaluate_logits(logits_of[name], part.labels) for name, part in parts.items() if len(part.labels)
    }
    test = scores["test"]
    seconds = result.earlier_seconds + time.perf_counter() - cli.STARTED
    progress.console.print(
        f"test accuracy {test['accuracy']:.2%} ({test['errors']} errors in {test['examples']:,}) after {seconds:.1f} s"
    )
    run.write_json(directory / "evaluation_test.json", {"dataset": config.dataset, "split": "test"} | test)

    device = devices.describe(mesh)
    examples = len(splits.train.labels) // config.batch_size * config.batch_size * result.records[-1]["epoch"]
    summary = {
        "dataset": config.dataset,
        "seed": config.seed,
        "parameters": result.parameters,
        "steps": int(result.state.step),
        "epochs": result.records[-1]["epoch"],
        "train_accuracy": scores["train"]["accuracy"],
        "validation_accuracy": scores["validation"]["accuracy"] if "validation" in scores else None,
        "test_accuracy": test["accuracy"],
        "test_loss": test["negative_log_likelihood"],
        "test_errors": test["errors"],
        "train_seconds": result.train_seconds,
        "total_seconds": seconds,
        "compile_seconds": result.compile_seconds,
        "images_per_second": examples / result.train_seconds,
        "device": f"{device['count']} x {device['kind']}",
    }
    report.write(
        directory,
        summary=summary,
        images=splits.test.images,
        labels=splits.test.labels,
        logits=logits_of["test"],
        kernel=model.first_kernel(state.variables()),
        class_names=names,
    )
    summary["total_seconds"] = result.earlier_seconds + time.perf_counter() - cli.STARTED
    run.write_json(directory / "summary.json", summary)
    progress.print_summary(summary)
    return summary
