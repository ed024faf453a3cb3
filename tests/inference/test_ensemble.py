import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import softmax

from mnist_flax.data import datasets
from mnist_flax.inference import ensemble, formats
from mnist_flax.inference.run import Run, load_run
from mnist_flax.runtime import run_dir
from mnist_flax.runtime.cli import UserError


def logits_of(places: list[Path], split: datasets.Split) -> np.ndarray:
    """Of each member, by its own run's model in float32."""
    runs = [load_run(place) for place in places]
    models = [each.model.clone(compute_dtype=np.dtype("float32"), impl="lax") for each in runs]
    images = split.images / np.float32(255)
    return np.stack([jax.jit(m.apply)(each.variables, images) for m, each in zip(models, runs, strict=True)])


@pytest.fixture(scope="module")
def together(digits_ensemble) -> Run:
    return load_run(digits_ensemble[0])


@pytest.fixture(scope="module")
def splits(together) -> datasets.Splits:
    return datasets.load(together.config)


@pytest.fixture(scope="module")
def expected(digits_ensemble, splits) -> np.ndarray:
    """Probabilities of the ensemble on the test split, by NumPy."""
    return softmax(logits_of(digits_ensemble[1], splits.test).astype(np.float64), axis=-1).mean(0)


# What is made


def test_it_is_recorded_what_it_was_made_of(digits_ensemble, together):
    directory, places = digits_ensemble
    recorded = json.loads((directory / "config.json").read_text())
    assert recorded["config"]["dataset"] == "digits"
    assert recorded["members"][0]["path"] == str(places[0]) and len(recorded["members"]) == 3
    for member, place in zip(recorded["members"], places, strict=True):
        original = json.loads((place / "config.json").read_text())
        assert member["config"] == original["config"] and member["seed"] == original["config"]["seed"]
        assert member["git_revision"] == original["git_revision"]
        assert member["test_accuracy"] == json.loads((place / "summary.json").read_text())["test_accuracy"]
    for variables, place in zip(together.model.split(together.variables), places, strict=True):
        for ours, theirs in zip(*map(jax.tree.leaves, (variables, load_run(place).variables)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_it_is_small_and_whole(digits_ensemble):
    directory, places = digits_ensemble
    made = {path.name for path in directory.iterdir()}
    assert {"config.json", "checkpoints", "evaluation_test.json", "report.html", "figures", "summary.json"} <= made
    sizes = [
        sum(path.stat().st_size for path in (place / "checkpoints").rglob("*") if path.is_file())
        for place in (directory, *places)
    ]
    assert sizes[0] < sum(sizes[1:]) / 3  # no optimizer state, one checkpoint each


def test_summary_counts_the_errors_of_the_mean_probabilities(digits_ensemble, expected, splits, together):
    directory, places = digits_ensemble
    summary = run_dir.read_summary(directory)
    members = [run_dir.read_summary(place) for place in places]
    errors = int((expected.argmax(1) != splits.test.labels).sum())
    assert abs(summary["test_errors"] - errors) <= 1  # the command may have computed in bfloat16
    evaluation = json.loads((directory / "evaluation_test.json").read_text())
    assert evaluation["errors"] == summary["test_errors"] and evaluation["examples"] == len(splits.test.labels)
    assert summary["parameters"] == sum(member["parameters"] for member in members)
    assert summary["train_seconds"] == pytest.approx(sum(member["train_seconds"] for member in members))
    assert summary["members_test_accuracy"] == pytest.approx(np.mean([m["test_accuracy"] for m in members]))
    assert 0.9 < summary["validation_accuracy"] <= 1


# What can be done with it


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_exported_file_gives_its_probabilities(name, together, expected, splits, tmp_path):
    for package in formats.FORMATS[name].packages:
        pytest.importorskip(package)
    formats.FORMATS[name].write(together, splits.train.images[:200], tmp_path / "model")
    predict = formats.FORMATS[name].load(tmp_path / "model")
    found = predict(splits.test.images)
    eight_bits = name == "onnx-int8"
    np.testing.assert_allclose(found, expected, atol=0.3 if eight_bits else 1e-5)
    assert (found.argmax(1) == expected.argmax(1)).mean() > (0.98 if eight_bits else 0.9999)
    np.testing.assert_allclose(predict(splits.test.images[:1]), found[:1], atol=1e-6)


# What is refused


def test_one_whose_member_was_trained_anew_is_not_shown_as_if_it_were_of_the_new_run(digits_ensemble, tmp_path):
    directory = shutil.copytree(digits_ensemble[0], tmp_path / "ensemble")
    runs = [shutil.copytree(place, tmp_path / place.name) for place in digits_ensemble[1]]
    recorded = json.loads((directory / "config.json").read_text())
    recorded["members"] = [ensemble.read_member(path) for path in runs]
    (directory / "config.json").write_text(json.dumps(recorded))
    ensemble.check_directory(directory, runs)
    summary = run_dir.read_summary(runs[1])
    (runs[1] / "summary.json").write_text(json.dumps(summary | {"train_seconds": summary["train_seconds"] + 1}))
    with pytest.raises(UserError, match=f"{runs[1]} as it was before it was trained anew"):
        ensemble.check_directory(directory, runs)
    (directory / "summary.json").unlink()  # not finished: it is made of the new run
    ensemble.check_directory(directory, runs)


def test_members_that_cannot_be_are_refused(digits_ensemble, tmp_path):
    directory, (first, *_) = digits_ensemble
    unfinished = shutil.copytree(first, tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    damaged = shutil.copytree(first, tmp_path / "damaged")
    summary = run_dir.read_summary(damaged)
    del summary["test_accuracy"]
    run_dir.write_json(damaged / "summary.json", summary)
    for place, message in (
        (damaged, "is damaged"),
        (tmp_path, "is no run directory"),
        (unfinished, "is not finished"),
        (directory, "is an ensemble: name the runs"),
    ):
        with pytest.raises(UserError, match=message):
            ensemble.read_member(place)
    member = ensemble.read_member(first)
    for field, value in (("dataset", "mnist"), ("validation_examples", 7)):
        other = {**member, "config": {**member["config"], field: value}}
        with pytest.raises(UserError, match=rf"config\.{field} is "):
            ensemble.check_members([member, member, other])


def test_directories_of_something_else_are_refused(digits_ensemble, tmp_path):
    directory, (first, *others) = digits_ensemble
    (tmp_path / "file").write_text("mine")
    for place, message in (
        (tmp_path, "neither empty nor an ensemble"),
        (tmp_path / "file", "is a file"),
        (first, "holds a run"),
        (directory, "of other runs"),
    ):
        with pytest.raises(UserError, match=message):
            ensemble.check_directory(place, [first, others[0]])
    (tmp_path / "empty").mkdir()
    ensemble.check_directory(tmp_path / "empty", [first])
    ensemble.check_directory(tmp_path / "new", [first])
