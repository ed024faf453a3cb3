from types import SimpleNamespace

import optuna
import pytest

from mnist_flax.experiments.research import samplers, space
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.config import default_config

RATE = "optimizer.learning_rate"
SPACE = {
    "optimizer.name": space.choice("adam", "sgd"),
    RATE: space.log_uniform(1e-4, 1e-1),
    "optimizer.momentum": space.uniform(0.5, 0.99).when("optimizer.name", "sgd"),
    "num_epochs": space.integer(1, 4),
    "model.channels": space.choice((8, 16, 32), (4, 4, 4)),
}

EPOCHS = {"num_epochs": space.integer(1, 2)}


def define(**functions):
    return space.define(SimpleNamespace(**functions), default_config())


def ask(count, sampler_name="quasirandom", objective=None, ranges=SPACE):
    """Trials of a study in memory, told as they are asked."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, found = optuna.create_study(), []
    for number in range(count):
        study.sampler = samplers.make_sampler(sampler_name, ranges, 0, number, number)
        trial = study.ask()
        found.append(samplers.suggest(trial, ranges))
        study.tell(trial, objective(found[-1]) if objective else 0.0)
    return found


def test_identity_tells_spaces_and_configs_apart():
    base = define(search_space=lambda: SPACE).identity()
    for change in ({RATE: space.log_uniform(1e-4, 1.0)}, {"num_epochs": space.integer(1, 5)}):
        assert define(search_space=lambda c=change: SPACE | c).identity() != base
    assert define(search_space=lambda: SPACE, plan=lambda: space.Plan(objective="validation_loss")).identity() != base


def test_a_target_that_is_not_asked_for_makes_no_difference():
    plans = (space.Plan(), space.Plan(target=0.5, evaluations=3))
    first, second = (define(search_space=lambda: SPACE, plan=lambda p=plan: p).identity() for plan in plans)
    assert first == second


@pytest.mark.parametrize(
    ("functions", "hint"),
    [
        ({}, "either search_space"),
        ({"search_space": {}, "sweep": []}, "either search_space"),
        ({"sweep": []}, "yield overrides"),
        ({"search_space": {"optimizer.learning_rat": space.uniform(0, 1)}}, "did you mean optimizer.learning_rate"),
        ({"search_space": {RATE: space.log_uniform(0.1, 0.1)}}, "is empty"),
        ({"search_space": {RATE: space.log_uniform(0.0, 0.1)}}, "begin above 0"),
        ({"search_space": {RATE: space.choice()}}, "empty choice"),
        ({"search_space": {"model.dense": space.choice([8], (8, 8), (8,))}}, "names a value twice"),
        ({"search_space": {RATE: 0.1}}, "must be log_uniform"),
        ({"search_space": {"model.dropout_rate": space.uniform(0.0, 1.5)}}, "out of range"),
        ({"search_space": {"num_epochs": space.uniform(1.0, 4.0)}}, "num_epochs"),
        ({"search_space": {"num_epochs": space.integer(1.5, 4)}}, "whole ends"),
        ({"search_space": {"optimizer.name": space.choice("adam", "adamm")}}, "adamm"),
        ({"search_space": {"seed": space.integer(0, 3).when("batch_size", 8)}}, "named before"),
        ({"search_space": EPOCHS | {"seed": space.integer(0, 3).when("num_epochs", 2, 99)}}, "never has: .*99"),
        ({"search_space": EPOCHS | {"seed": space.integer(0, 3).when("num_epochs", "2")}}, "never has"),
        ({"search_space": SPACE | {"seed": space.integer(0, 3).when(RATE, 1e-2)}}, "never has"),
        ({"search_space": {"dataset": space.choice("mnist", "kmnist")}}, "the same for all members"),
        ({"search_space": {"patience": space.integer(0, 2)}}, "to its end"),
        ({"sweep": [{"optimizer.learning_rate": -1.0}]}, "out of range"),
        ({"sweep": [{"optimiser.name": "adam"}]}, "optimiser"),
        ({"sweep": [{"model": {"padding": "SAME"}}]}, "model is no field"),
        ({"sweep": [{3: 4}]}, "3 is no field"),
        ({"sweep": [{"model.channels": [[8]]}]}, "whole numbers"),
        ({"sweep": None}, r"sweep\(\) fails with TypeError"),
        ({"search_space": None}, "must return ranges by field"),
        ({"search_space": {}}, "must return ranges by field"),
        ({"search_space": {3: space.uniform(0, 1)}}, "3 is no field"),
        ({"search_space": {"seed": space.integer("a", 4)}}, "whole ends"),
        ({"search_space": {"model.dense": space.choice({})}}, "model.dense"),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_one_line(functions, hint):
    with pytest.raises(UserError, match=hint) as caught:
        define(**{name: lambda value=value: value for name, value in functions.items()})
    assert "\n" not in str(caught.value)


def test_a_range_may_depend_on_a_whole_number():
    ranges = EPOCHS | {"seed": space.integer(0, 9).when("num_epochs", 2)}
    trials = ask(8, ranges=define(search_space=lambda: ranges).space)
    assert [("seed" in trial) for trial in trials] == [trial["num_epochs"] == 2 for trial in trials]


def test_what_a_sweep_yields_twice_is_one_trial():
    assert define(sweep=lambda: [{"seed": 1}, {"num_epochs": 2}, {"seed": 1}]).sweep == [{"seed": 1}, {"num_epochs": 2}]


def test_lists_may_be_given_for_tuples():
    widths = [[8, 16, 16], [16, 32, 32]]
    swept = define(sweep=lambda: space.product({"model.channels": widths}))
    assert swept.sweep == [{"model.channels": (8, 16, 16)}, {"model.channels": (16, 32, 32)}]
    searched = define(
        search_space=lambda: {
            "model.channels": space.choice(*widths),
            "seed": space.integer(0, 9).when("model.channels", [8, 16, 16]),
        }
    )
    assert searched.space["model.channels"] == swept.space["model.channels"] == space.choice((8, 16, 16), (16, 32, 32))
    trials = ask(8, ranges=searched.space)
    assert {trial["model.channels"] for trial in trials} == {(8, 16, 16), (16, 32, 32)}
    assert all(("seed" in trial) == (trial["model.channels"] == (8, 16, 16)) for trial in trials)


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"target": 5}, "target=5 must be a number from 0 to 1"),
        ({"target": "0.9"}, "target='0.9' must be a number"),
        ({"target": float("nan")}, "target=nan must be"),
        ({"rounds": "3", "evaluations": -1}, "evaluations=-1 must be a whole number from 0 on"),
        ({"rounds": "3"}, "rounds='3' must be a whole number from 1 to 6"),
        ({"rounds": -2}, "rounds=-2 must be"),
        ({"rounds": 7}, "rounds=7 must be"),
        ({"repeats": 0}, "repeats=0 must be a whole number from 1"),
        ({"evaluations": 2.0}, "evaluations=2.0 must be"),
        ({"question": None}, "question is a text"),
        ({"scientific": RATE}, "scientific a tuple of fields"),
        ({"scientific": ([],)}, "is not in the space"),
        ({"objective": "test_error"}, "objective is one of"),
        ({"objectiv": "validation_error"}, r"plan\(\) fails with TypeError"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(fields, hint):
    with pytest.raises(UserError, match=hint) as caught:
        define(search_space=lambda: SPACE, plan=lambda: space.Plan(**fields))
    assert "\n" not in str(caught.value)


def test_what_a_config_file_gets_wrong_itself_is_refused_in_one_line():
    def derive(config):
        config.num_epochs = (1, 2)[2]

    def mistyped(config):
        config.optimzer.name = "sgd"

    for functions, hint in (
        ({"search_space": lambda: {RATE: space.uniform("a", 0.2)}}, "search_space.* ValueError: could not convert"),
        ({"search_space": lambda: SPACE, "plan": lambda: {"rounds": 2}}, "space.Plan, not dict"),
        ({"search_space": lambda: SPACE, "derive": derive}, "config cannot be made: tuple index"),
        ({"search_space": lambda: SPACE, "derive": mistyped}, "config cannot be made: 'optimzer' Did you mean"),
    ):
        with pytest.raises(UserError, match=hint):
            define(**functions)


def test_repeats_and_seeds_of_the_space_exclude_each_other():
    ranges = {"seed": space.choice(0, 1)}
    with pytest.raises(UserError, match="use either"):
        space.define(SimpleNamespace(search_space=lambda: ranges), default_config(), repeats=2)
