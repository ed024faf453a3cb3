"""Trains on 1, 2, 4 and 8 simulated devices, and once across device counts: `python -m tests.many_devices DATA OUT`."""

import json
import sys
from pathlib import Path

import jax

from mnist_flax.data import datasets
from mnist_flax.runtime import cli, devices
from mnist_flax.runtime.config import default_config
from mnist_flax.training import loop

# Everything on that could depend on how a batch is split.
FIELDS = {
    "dataset": "digits",
    "train_examples": 330,
    "validation_examples": 101,  # a prime: padded for every number of devices
    "batch_size": 32,
    "eval_batch_size": 40,
    "num_epochs": 3,
    "model.channels": (4,),
    "model.pool_sizes": (4,),
    "model.dense": (8,),
    "model.batch_norm": True,
    "model.compute_dtype": "float32",
    "model.dropout_rate": 0.2,
    "optimizer.learning_rate": 0.01,
    "optimizer.accumulate_steps": 2,
    "augment.strokes": 1.0,
    **{f"augment.{name}": 0.0 for name in ("rotation", "shift", "zoom", "shear")},  # quick to compile
}


def fit(directory: Path, count: int, epochs: int | None = None, **fields) -> list[dict]:
    """Metrics after training on `count` devices, to the end or until `epochs` were recorded."""
    config = default_config()
    config.update_from_flattened_dict(FIELDS | {"data_dir": sys.argv[1]} | fields)
    metrics = directory / "metrics.jsonl"

    def stop() -> bool:
        return epochs is not None and metrics.exists() and len(metrics.read_text().splitlines()) >= 2 * epochs

    directory.mkdir(exist_ok=True)
    mesh = devices.make_mesh(jax.devices()[:count])
    return loop.fit(config, datasets.load(config), 10, directory, mesh, stop).records


def refusal(**fields) -> str:
    config = default_config()
    config.update_from_flattened_dict(fields)
    try:
        devices.check_batch(config, devices.make_mesh())
    except cli.UserError as error:
        return str(error)
    return ""


def main() -> None:
    out = Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    devices.keep_compiled_programs()
    feeds = {1: "device", 2: "stream", 4: "stream", 8: "device"}
    found = {str(count): fit(out / str(count), count, feed=feed) for count, feed in feeds.items()}
    for count, epochs in ((8, 1), (1, 2), (8, None)):
        found["across"] = fit(out / "across", count, epochs)
    refused = [refusal(batch_size=100), refusal(**{"batch_size": 32, "optimizer.accumulate_steps": 8}), refusal()]
    (out / "found.json").write_text(json.dumps({"records": found, "refused": refused}))


if __name__ == "__main__":
    main()
