import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_flax.experiments.research import samplers, space
from tests.experiments.test_space import RATE, SPACE, ask, define


def test_trials_lie_in_the_space_and_make_configs():
    definition = define(search_space=lambda: SPACE)
    trials = ask(64)
    for trial in trials:
        config = definition.trial_config(trial)
        assert config.optimizer.learning_rate == trial[RATE] and config.model.channels == trial["model.channels"]
        assert ("optimizer.momentum" in trial) == (trial["optimizer.name"] == "sgd")
    # Quasi-random: every 16th of the range has its share, of logarithms.
    shares = np.log10([trial[RATE] for trial in trials]) / 3 + 4 / 3
    assert set(np.histogram(shares, 16, (0, 1))[0]) == {4}
    for key, values in (("optimizer.name", 2), ("num_epochs", 4), ("model.channels", 2)):
        assert {sum(t[key] == v for t in trials) for v in {t[key] for t in trials}} == {64 // values}


def test_a_trial_is_placed_by_its_number_whoever_asks():
    alone = ask(6)
    study = optuna.create_study()
    trials = [study.ask() for _ in range(6)]
    study.sampler = samplers.QuasiRandom(list(SPACE), 0)
    assert [samplers.suggest(trial, SPACE) for trial in reversed(trials)] == list(reversed(alone))


@given(
    share=st.floats(0, 1, exclude_max=True),
    low=st.floats(1e-6, 1e3),
    factor=st.floats(1.001, 1e4),
    log=st.booleans(),
    ends=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
)
def test_places_are_within_their_range(share, low, factor, log, ends):
    high = low * factor
    assert low <= samplers.place(share, FloatDistribution(low, high, log=log)) <= high
    first, last = sorted(ends)
    assert first <= samplers.place(share, IntDistribution(first, last, log=log)) <= last
    assert samplers.place(share, CategoricalDistribution(["a", "b", "c"])) == "abc"[int(3 * share)]


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_adaptive_samplers_close_in_on_the_optimum(name):
    ranges = {RATE: space.log_uniform(1e-6, 1.0), "optimizer.b1": space.uniform(0.1, 0.9)}

    def objective(trial):
        return (np.log10(trial[RATE]) + 3) ** 2 + 25 * (trial["optimizer.b1"] - 0.3) ** 2

    values = [objective(trial) for trial in ask(60, name, objective, ranges)]
    assert np.median(values[-20:]) < np.median(values[:10]) / 4


def test_retried_trials_and_sweeps_keep_their_values():
    entries = [{RATE: 0.1, "model.channels": (4, 8, 8)}, {"batch_size": 32}]
    definition = define(sweep=lambda: iter(entries))
    study = optuna.create_study(sampler=samplers.QuasiRandom(list(definition.space), 0))
    for entry in entries:
        fixed = samplers.fixed_params(entry)
        study.enqueue_trial(fixed)
        assert samplers.suggest(study.ask(), definition.space, fixed) == entry


def test_points_give_each_space_its_budget():
    points = samplers.points({RATE: space.log_uniform(1e-3, 1e-1), "seed": space.choice(1, 2)}, 8, seed=0)
    assert len(points) == 8 and all(1e-3 <= p[RATE] <= 1e-1 and p["seed"] in (1, 2) for p in points)
    assert len(list(space.product({"seed": [0, 1], "batch_size": [8, 16, 32]}))) == 6
