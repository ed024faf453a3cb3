"""The end of a run, with a network whose logits NumPy computes too, against scikit-learn."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from scipy.special import softmax

from mnist_flax.data import datasets
from mnist_flax.runtime import devices, terminal
from mnist_flax.runtime.cli import RunError
from mnist_flax.runtime.config import default_config
from mnist_flax.training import finalize


class Linear:
    """Logits that are linear in the pixels; the filter is there for the report to draw."""

    def apply(self, variables, images):
        return images.reshape(len(images), -1) @ variables["params"]["weights"]


def finished(directory, weights, **splits):
    random = np.random.default_rng(0)

    def split(count):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        return datasets.Split(images, random.integers(0, 10, count).astype(np.int32))

    made = datasets.Splits(split(30), split(splits.get("validation", 20)), split(50), np.arange(30, dtype=np.int32))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"config": {}, "members": []}))  # without learning curves
    variables = {"params": {"weights": jnp.asarray(weights), "conv0_kernel": jnp.ones((3, 3, 1, 4))}}
    config = default_config()
    config.dataset, config.eval_batch_size = "digits", 16
    arguments = (config, made, directory, devices.make_mesh(), {"seed": 5}, time.perf_counter(), terminal.QUIET)
    return finalize.finalize(Linear(), variables, *arguments), made


@pytest.mark.parametrize("held_out", [20, 0])
def test_the_summary_says_how_right_the_network_is_on_each_split(tmp_path, held_out):
    weights = np.random.default_rng(1).normal(size=(784, 10), scale=0.1).astype(np.float32)
    summary, splits = finished(tmp_path / "run", weights, validation=held_out)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    logits = {name: getattr(splits, name).images.reshape(-1, 784) / 255 @ weights for name in splits._fields[:3]}
    for name, values in logits.items():
        labels = getattr(splits, name).labels
        expected = sklearn.metrics.accuracy_score(labels, values.argmax(1)) if len(labels) else None
        assert summary[f"{name}_accuracy"] == (expected if expected is None else pytest.approx(expected))
    loss = sklearn.metrics.log_loss(splits.test.labels, softmax(logits["test"], axis=1), labels=range(10))
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert summary["test_errors"] == (logits["test"].argmax(1) != splits.test.labels).sum()
    assert summary["seed"] == 5 and summary["dataset"] == "digits"
    scores = json.loads((tmp_path / "run" / "evaluation_test.json").read_text())
    assert (scores["split"], scores["examples"], scores["accuracy"]) == ("test", 50, summary["test_accuracy"])
    assert (tmp_path / "run" / "report.html").exists()


def test_logits_that_are_not_finite_finish_nothing(tmp_path):
    with pytest.raises(RunError, match="NaN or infinite logits for test images"):
        finished(tmp_path / "run", np.full((784, 10), np.inf, np.float32))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
