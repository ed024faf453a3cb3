import optuna
import pytest

from mnist_flax.experiments.research import confirm
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.config import default_config
from tests.commands import command
from tests.experiments.test_directory import new_study
from tests.experiments.test_study import FAIL, open_study


def test_a_baseline_that_won_is_not_compared_with_itself(tmp_path):
    place = new_study(tmp_path / "which? {100%41} #1" / "study")
    open_study(place).add_trial(optuna.create_trial(value=0.5, user_attrs={"config": {"seed": 3}}))
    assert "trial 0, is the baseline" in command("experiments.study", "confirm", place).stdout
    assert not (place / "confirmation.json").exists()


def test_the_best_of_equal_trials_is_the_first_and_none_is_an_error():
    study = optuna.create_study()
    with pytest.raises(UserError, match="no complete trial yet"):
        confirm.best_trial(study)
    for value in (0.3, 0.1, 0.1):
        study.add_trial(optuna.create_trial(value=value))
    assert confirm.best_trial(study).number == 1


def test_scores_are_compared_seed_by_seed_in_whatever_order_they_came():
    fields_of = {"winner": {"model.dense": (8,), "seed": 9}, "baseline": {"model.dense": (16,), "seed": 0}}
    accuracies = {"winner": {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}, "baseline": {4: 0.5, 3: 0.65, 1: 0.95}}  # 2 has no pair
    study = optuna.create_study()

    def add(role, seed, accuracy, **state):
        recorded = {"model.dense": list(fields_of[role]["model.dense"]), "seed": seed}  # as JSON gives it back
        told = {"config": recorded, "test_accuracy": accuracy}
        study.add_trial(optuna.create_trial(value=None if state else 1 - accuracy, user_attrs=told, **state))

    add("baseline", 2, 0.1, state=FAIL)
    for role, scores in accuracies.items():
        for seed, accuracy in scores.items():
            add(role, seed, accuracy)
    found = confirm.compare(study, fields_of, range(1, 4), default_config())
    assert found["seeds"] == [1, 3]
    assert found["test_accuracy"]["winner"]["values"] == [0.9, 0.7]
    assert found["test_accuracy"]["baseline"]["values"] == [0.95, 0.65]
    assert found["test_accuracy"]["difference"]["values"] == pytest.approx([-0.05, 0.05])
    assert found["objective_value"]["difference"]["values"] == pytest.approx([0.05, -0.05])
    with pytest.raises(UserError, match="fewer than two seeds"):
        confirm.compare(study, fields_of, range(1, 3), default_config())
