"""`config.get_ref` means the same in the main job, a population, a study, its winner and its confirmation."""

import json
import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mnist_flax.experiments.research import confirm, members, space
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.config import flatten
from mnist_flax.training.state import hyperparameters
from tests.commands import command, finish, start
from tests.experiments.test_study import COMPLETE, open_study, trials

RECIPE = """
from configs import digits
from mnist_flax.experiments.research import space


def get_config():
    config = digits.get_config()
    config.validation_examples = 200
    config.num_epochs = 2
    config.model.channels, config.model.dense = (3, 4), (8,)
    config.model.compute_dtype = "float32"
    config.optimizer.learning_rate = config.get_ref("batch_size").to_float() * 1e-4
    config.optimizer.warmup_epochs = 0.1 * config.get_ref("num_epochs").to_float()
    config.optimizer.weight_decay = config.optimizer.get_ref("learning_rate") * 0.1  # a chain
    config.optimizer.final_scale = config.optimizer.get_ref("warmup_epochs") / 10
    return config


def search_space():
    return {"batch_size": space.choice(16, 64), "num_epochs": space.choice(1, 2)}
"""
FOLLOWING = ("learning_rate", "warmup_epochs", "weight_decay", "final_scale")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "references.py"
    path.write_text(RECIPE)
    return path


def loaded(path) -> ConfigDict:
    return runpy.run_path(str(path))["get_config"]().lock()


def values(config):
    return {key: config.optimizer[key] for key in FOLLOWING}


def expected(batch_size, num_epochs):
    rate, warmup = batch_size * 1e-4, 0.1 * num_epochs
    chain = {"learning_rate": rate, "warmup_epochs": warmup, "weight_decay": rate * 0.1, "final_scale": warmup / 10}
    return pytest.approx(chain)


def test_trials_follow_as_flags_do_and_leave_the_recipe_as_it_was(recipe):
    config = loaded(recipe)
    definition = space.Definition(config, {}, [], space.Plan())
    assert values(definition.trial_config({"batch_size": 64, "num_epochs": 5})) == expected(64, 5)
    assert values(definition.trial_config({"num_epochs": 5})) == expected(config.batch_size, 5)
    # A field that refers to others and is set itself follows no longer, but is followed.
    fixed = definition.trial_config({"optimizer.learning_rate": 0.5, "batch_size": 64, "num_epochs": 2})
    assert values(fixed) == {**expected(64, 2).expected, "learning_rate": 0.5, "weight_decay": 0.05}
    assert values(config) == expected(config.batch_size, config.num_epochs)


def test_a_recorded_trial_keeps_what_it_was_trained_with(recipe, tmp_path):
    """Also a field that the trial set to what the recipe has, while what it refers to differs."""
    config = loaded(recipe)
    definition = space.Definition(config, {}, [], space.Plan())
    won = definition.trial_config(
        {"optimizer.learning_rate": config.optimizer.learning_rate, "batch_size": config.batch_size * 2}
    )
    trial = SimpleNamespace(number=0, value=0.1, user_attrs={"config": space.changed(config, won)})
    study = SimpleNamespace(study_name="study", get_trials=lambda **_: [trial])
    written = loaded(confirm.write_winner(tmp_path, study, config))
    assert flatten(written) == flatten(won) and written.optimizer.learning_rate == config.optimizer.learning_rate


def test_hyperparameters_of_a_member_are_those_of_its_own_run(recipe, digits_data_dir):
    """Members of one program, whose lengths differ, and with them all that refers to their length."""
    config = members.with_fields(loaded(recipe), {"data_dir": str(digits_data_dir)})
    follow = [members.with_fields(config, {"num_epochs": epochs}) for epochs in (1, 4)]
    written = [members.with_fields(c.copy_and_resolve_references(), {"num_epochs": c.num_epochs}) for c in follow]
    assert [values(c) for c in follow] == [expected(32, 1), expected(32, 4)]
    assert members.program_key(follow[0]) == members.program_key(follow[1])
    columns = members.merged(follow)[1]
    for i, member in enumerate(follow):
        own = {key: np.float32(value) for key, value in hyperparameters(member).items()}
        assert {key: column[i] for key, column in columns.items() if key != "optimizer.clip_norm"} == {
            key: value for key, value in own.items() if key != "optimizer.clip_norm"
        }
    programs = members.Programs.load(config)
    populations = [members.Population(configs, programs) for configs in (follow, written)]
    for population in populations:
        population.advance(1.0, np.ones(2, bool))
    assert jax.tree.all(jax.tree.map(np.array_equal, *(population.states() for population in populations)))
    assert populations[0].records == populations[1].records


def test_a_study_its_winner_its_confirmation_and_the_main_job_agree(recipe, digits_data_dir, tmp_path):
    """Two workers share a space of four points, which is less than they are asked for."""
    place, data_dir = tmp_path / "study", f"--config.data_dir={digits_data_dir}"
    arguments = (f"--config={recipe}", data_dir, f"--workdir={place}", "--population=1", "--heartbeat=1")
    workers = [start("experiments.study", *arguments, "--trials=9") for _ in range(2)]
    for ended in map(finish, workers):
        assert "the space is exhausted: 4 trials are all its points" in ended.stdout
    found = trials(place)
    assert [trial.state for trial in found] == [COMPLETE] * 4
    assert {(t.params["batch_size"], t.params["num_epochs"]) for t in found} == {(16, 1), (16, 2), (64, 1), (64, 2)}
    config = loaded(recipe)
    for trial in found:
        trained = members.with_fields(config.copy_and_resolve_references(), trial.user_attrs["config"])
        assert values(trained) == expected(trial.params["batch_size"], trial.params["num_epochs"])

    best = confirm.best_trial(open_study(place))
    winner = loaded(place / "winner.py")
    assert values(winner) == expected(**best.params)
    overrides = [f"--config.{key}={value}" for key, value in best.params.items()]
    command("mnist_flax.main", f"--config={recipe}", *overrides, data_dir, f"--workdir={tmp_path / 'main'}")
    recorded = json.loads((tmp_path / "main" / "config.json").read_text())["config"]
    assert {key: recorded["optimizer"][key] for key in FOLLOWING} == expected(**best.params)
    score = json.loads((tmp_path / "main" / "summary.json").read_text())["validation_accuracy"]
    assert 1 - score == pytest.approx(best.value, abs=0.0051)


def test_what_follows_the_seed_is_refused(recipe):
    config = loaded(recipe)
    config.train_examples = config.get_ref("seed") + 1_000
    module = SimpleNamespace(search_space=lambda: {"batch_size": space.choice(16, 64)})
    with pytest.raises(UserError, match=r"config\.train_examples follows config\.seed"):
        space.define(module, config)
