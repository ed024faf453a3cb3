"""A run that is given more epochs: the run that would have been trained with them from the start."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import run_dir
from mnist_flax.runtime.cli import UserError
from mnist_flax.training.augment import strength_at
from mnist_flax.training.optimizer import make_schedule
from mnist_flax.training.state import hyperparameters
from tests.commands import command, final_state, records, refusal

TINY = (
    *("--config=configs/digits.py", "--config.model.channels=(4,)", "--config.model.dense=(8,)"),
    *("--config.optimizer.schedule=constant", "--config.augment.rotation=0.0", "--config.augment.zoom=0.0"),
)
SUMMARY = {"dataset": "digits", "device": "1 x test", "seed": 0, "test_accuracy": 0.5, "epochs": 2}


@pytest.fixture(scope="module")
def tiny(digits_data_dir):
    return (*TINY, f"--config.data_dir={digits_data_dir}")


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """A finished run of two epochs."""
    workdir = tmp_path_factory.mktemp("extended") / "run"
    command("mnist_flax.main", *tiny, f"--workdir={workdir}", "--config.num_epochs=2")
    return workdir


@pytest.fixture
def finished(tmp_path):
    """What a finished run of two epochs leaves, as far as its length matters, and its config."""
    config = config_lib.default_config()
    config.num_epochs, config.optimizer.schedule = 2, "constant"
    run_dir.write_config(tmp_path, config, {})
    run_dir.write_json(tmp_path / "summary.json", SUMMARY)
    (tmp_path / "figures").mkdir()
    for name in ("report.html", "evaluation_test.json", "figures/corruptions.png"):
        (tmp_path / name).write_text(name)
    return tmp_path, config


def test_more_epochs_give_bit_for_bit_the_run_that_had_them_from_the_start(short, tiny, tmp_path):
    extended, straight = tmp_path / "extended", tmp_path / "straight"
    shutil.copytree(short, extended)
    longer = (*tiny, "--config.num_epochs=3")
    out = command("mnist_flax.main", *longer, f"--workdir={extended}").stdout
    assert "going on from 2 to 3 epochs" in out and "the test split is scored again" in out
    command("mnist_flax.main", *longer, f"--workdir={straight}")
    assert final_state(extended) == final_state(straight)
    timeless = ("step", "epoch", "split", "loss", "accuracy", "learning_rate")
    ours, theirs = ([[r[key] for key in timeless] for r in records(place)] for place in (extended, straight))
    assert ours == theirs
    configs = [json.loads((place / "config.json").read_text())["config"] for place in (extended, straight)]
    assert configs[0] == configs[1]
    ours, theirs = (json.loads((place / "summary.json").read_text()) for place in (extended, straight))
    assert ours.pop("test_scorings") == 2 and ours["epochs"] == 3 and ours.keys() == theirs.keys()
    assert all(ours[key] == theirs[key] for key in ours if not key.endswith(("seconds", "per_second")))
    kept = extended / "after_2_epochs"
    assert (kept / "summary.json").read_bytes() == (short / "summary.json").read_bytes()
    assert (kept / "figures" / "mistakes.png").exists()
    assert "test_scorings" in command("mnist_flax.main", *longer, f"--workdir={extended}").stdout  # finished again


def test_fewer_epochs_are_another_run(short, tiny):
    said = refusal("mnist_flax.main", *tiny, f"--workdir={short}", "--config.num_epochs=1")
    assert "holds a run of another config (num_epochs: 2 -> 1)" in said
    assert (short / "summary.json").exists()


def is_spread(config) -> bool:
    """Whether learning rate or augmentation of the first epochs change when there are more."""

    def course(epochs: int) -> list:
        hyper = hyperparameters(config) | {"num_epochs": float(epochs)}
        schedule = make_schedule(config.optimizer.schedule, hyper, 10)
        fields = {name: hyper[f"augment.{name}"] for name, value in config.augment.items() if value}
        strengths = [strength_at(jnp.float32(step / 10), hyper["num_epochs"], fields) for step in range(30)]
        return [np.asarray(schedule(step)).item() for step in range(30)] + [
            float(value) for strength in strengths for value in strength.values()
        ]

    return course(3) != course(5)


@pytest.mark.parametrize("schedule", config_lib._CHOICES["optimizer.schedule"])
@pytest.mark.parametrize("final_epochs", [0.0, 1.0])
def test_a_run_goes_on_where_its_course_does_not_depend_on_its_length_and_is_refused_elsewhere(
    schedule, final_epochs, finished
):
    directory, config = finished
    config.optimizer.schedule, config.augment.final_epochs = schedule, final_epochs
    (directory / "config.json").unlink()
    run_dir.write_config(directory, config, {})
    config.num_epochs = 3
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    if is_spread(config):
        with pytest.raises(UserError, match=r"depends on config\.num_epochs.*use another directory"):
            run_dir.read_finished(directory, config)
    else:
        assert run_dir.read_finished(directory, config) is None
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moves", range(5))
def test_wherever_it_is_killed_the_run_is_the_old_or_the_longer_one(moves, finished, monkeypatch):
    directory, config = finished
    longer = config.copy_and_resolve_references()
    longer.num_epochs = 3
    replace, done = run_dir.Path.replace, []

    def killed(path, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(path)
        return replace(path, target)

    monkeypatch.setattr(run_dir.Path, "replace", killed)
    monkeypatch.setattr(run_dir, "write_json", lambda *arguments: killed(None, None))
    with pytest.raises(KeyboardInterrupt):
        run_dir.extend(directory, longer)
    monkeypatch.undo()
    assert run_dir.read_config(directory).num_epochs == 2
    assert run_dir.read_finished(directory, config) == (SUMMARY if moves == 0 else None)
    assert run_dir.test_scorings(directory) == (moves > 0)
    assert run_dir.read_finished(directory, longer) is None
    assert run_dir.extend(directory, longer) == 2
    assert run_dir.read_config(directory).num_epochs == 3 and run_dir.read_finished(directory, longer) is None
    assert not list(directory.glob("*.html")) and not any((directory / "figures").iterdir())
    assert run_dir.read_json(directory / "after_2_epochs" / "summary.json") == SUMMARY
    assert run_dir.extend(directory, longer) is None
