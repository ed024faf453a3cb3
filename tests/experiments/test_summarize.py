import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mnist_flax.experiments.summarize import mean_interval
from mnist_flax.runtime import run_dir
from mnist_flax.runtime.config import default_config
from tests.commands import command, finish, refusal, start


@given(values=st.lists(st.floats(0.9, 1.0), min_size=2, max_size=20))
def test_interval_is_students(values):
    mean, deviation, half = mean_interval(values)
    assert mean == pytest.approx(np.mean(values)) and deviation == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    if deviation > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high))


def finished(directory, seed, accuracy, recipe=None, **more):
    directory.mkdir()
    config = default_config()
    config.update_from_flattened_dict({"seed": seed} | (recipe or {}))
    run_dir.write_config(directory, config, {})
    fields = {"train_accuracy": 1.0, "validation_accuracy": None, "train_seconds": 1.0}
    fields |= {"test_seconds": 2.0, "total_seconds": 3.0}
    summary = fields | {"dataset": config.dataset, "seed": seed, "test_accuracy": accuracy, "device": "1 x cpu"} | more
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def test_command_prints_mean_and_deviation(tmp_path):
    accuracies = enumerate((0.99, 0.995, 1.0))
    runs = [finished(tmp_path / str(i), i, accuracy, device=f"{1 + i // 2} x cpu") for i, accuracy in accuracies]
    out = command("experiments.summarize", *runs).stdout
    assert "mnist, 1 x cpu and 2 x cpu" in out
    assert "99.500%" in out and "0.500%" in out and "1.242%" in out


def test_numbers_are_those_of_each_column(tmp_path):
    runs = [finished(tmp_path / str(i), i, 0.99, train_accuracy=None if i else 1.0) for i in range(3)]
    lines = finish(start("experiments.summarize", *runs, COLUMNS="160")).stdout.replace("│", " ").splitlines()
    (numbers,) = (line.split() for line in lines if line.split()[:1] == ["n"])
    assert numbers == ["n", "1", "0", "3", "3", "3", "3"]


def test_command_refuses_what_cannot_be_averaged(tmp_path):
    first = finished(tmp_path / "a", 0, 0.9)
    for name, recipe in (("b", {"dataset": "digits"}), ("c", {"optimizer.learning_rate": 0.1, "num_epochs": 1})):
        error = refusal("experiments.summarize", first, finished(tmp_path / name, 1, 0.9, recipe))
        assert all(f"{key}: " in error for key in recipe) and "seed:" not in error
    assert "named more than once" in refusal("experiments.summarize", first, f"{first}/")
    (first / "summary.json").unlink()
    assert "not finished" in refusal("experiments.summarize", first)
    assert "no run directory" in refusal("experiments.summarize", tmp_path)


def test_no_number_is_cut_at_80_columns(tmp_path):
    runs = [finished(tmp_path / f"{i}-a-run-of-long-name", i, 0.99, train_seconds=123456.7) for i in range(2)]
    out = finish(start("experiments.summarize", *runs, COLUMNS="80")).stdout
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out and "99.000%" in out
