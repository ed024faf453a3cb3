"""No sampler tries a point of a space twice, and every point of a finite one is tried."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from mnist_flax.experiments.research import members, samplers, space, storage, untried, worker
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.config import default_config
from tests.experiments.test_population import config_for
from tests.experiments.test_space import RATE, define

FINITE = {
    "optimizer.name": space.choice("adam", "sgd", "muon"),
    "optimizer.nesterov": space.choice(False, True).when("optimizer.name", "sgd", "muon"),
    "num_epochs": space.integer(2, 4),
    "model.dense": space.choice((8,), (8, 8)).when("num_epochs", 3),
    "batch_size": space.integer(16, 17, log=True),
}


def enumerated(ranges):
    """All points, the plain way."""
    values = [d.values or range(d.low, d.high + 1) for d in ranges.values()]
    found = []
    for combination in itertools.product(*values):
        point = {}
        for (key, dimension), value in zip(ranges.items(), combination, strict=True):
            if dimension.applies(point):
                point[key] = value
        found += [point] if point not in found else []
    return found


def ask(count, name, ranges, objective=lambda point: 0.0):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, tried = optuna.create_study(), []
    for number in range(count):
        sampler = samplers.make_sampler(name, ranges, 0, number, number)
        study.sampler = samplers.WithoutRepetition(sampler, ranges, tried)
        trial = study.ask()
        point = samplers.suggest(trial, ranges)
        assert tried[-1] == point == samplers.point_of(ranges, study.trials[-1])
        study.tell(trial, objective(point))
    return tried


def test_points_are_counted_without_being_listed():
    assert untried.size(FINITE, {}) == len(enumerated(FINITE)) == 5 * 4 * 2
    assert untried.size(FINITE, {"optimizer.name": "adam"}) == 8
    large = {"seed": space.integer(0, 2**31 - 1), "num_epochs": space.integer(1, 10**6).when("seed", 7)}
    assert untried.size(large, {}) == 2**31 - 1 + 10**6
    assert untried.size({**FINITE, RATE: space.uniform(0.1, 0.2)}, {}) == math.inf


@pytest.mark.parametrize("name", space.SAMPLERS)
def test_every_sampler_enumerates_a_finite_space(name):
    tried = ask(40, name, FINITE, lambda point: abs(point["num_epochs"] - 2) + point["batch_size"] - 16)
    assert sorted(map(str, tried)) == sorted(map(str, enumerated(FINITE)))


def test_the_best_sampler_leaves_its_optimum_for_its_neighbors():
    ranges = {"num_epochs": space.integer(1, 100)}
    tried = [point["num_epochs"] for point in ask(40, "tpe", ranges, lambda point: abs(point["num_epochs"] - 50))]
    assert len(set(tried)) == 40 and sum(abs(epochs - 50) <= 15 for epochs in tried[10:]) >= 20


def test_a_finite_branch_of_an_infinite_space_is_tried_once():
    ranges = {
        "optimizer.name": space.choice("adam", "sgd"),
        "optimizer.momentum": space.uniform(0.5, 0.9).when("optimizer.name", "sgd"),
    }
    tried = ask(8, "quasirandom", ranges)
    assert [point["optimizer.name"] for point in tried].count("adam") == 1
    assert len({point.get("optimizer.momentum") for point in tried}) == 8


def test_workers_on_one_storage_share_the_points(tmp_path):
    definition = define(search_space=lambda: FINITE)
    url = storage.default_url(tmp_path)
    worker.join("study", definition, storage.connect(url, heartbeat=60), tmp_path)

    def work(_):
        database = storage.connect(url, heartbeat=60)
        study = optuna.load_study(study_name="study", storage=database)
        one = worker.Worker(study, database, definition, None, trials=64, population=3, sampler="quasirandom",
                            rounds=1, test=False, stop=lambda: False)  # fmt: skip
        while batch := one._take():
            for trial, _ in batch:
                study.tell(trial, 0.5)

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(work, range(2)))
    trials = optuna.load_study(study_name="study", storage=url).trials
    points = [samplers.point_of(FINITE, trial) for trial in trials]
    assert sorted(map(str, points)) == sorted(map(str, enumerated(FINITE)))


def test_a_point_that_waits_to_be_tried_again_is_no_other_trial_s(tmp_path):
    ranges = {"batch_size": space.choice(8, 16, 32)}
    definition = define(search_space=lambda: ranges)
    database = storage.connect(storage.default_url(tmp_path), heartbeat=60)
    study = worker.join("study", definition, database, tmp_path)
    one = worker.Worker(study, database, definition, None, trials=3, population=1, sampler="quasirandom", rounds=1,
                        test=False, stop=lambda: False)  # fmt: skip
    [(first, point)] = one._take()
    with storage.exclusive(database):
        storage.requeue(study, database.get_trial(first._trial_id))
    again = [one._take() for _ in range(4)]
    assert next(overrides for batch in again for _, overrides in batch) == point and not again[-1]
    assert {overrides["batch_size"] for batch in again for _, overrides in batch} == {8, 16, 32}


def test_the_value_of_a_repeated_trial_is_the_mean_over_its_seeds(digits_data_dir, tmp_path):
    config = config_for(digits_data_dir, seed=5)
    ranges = {"num_epochs": space.choice(1, 2)}
    definition = space.define(SimpleNamespace(search_space=lambda: ranges), config, repeats=2)
    database = storage.connect(storage.default_url(tmp_path), heartbeat=60)
    study = worker.join("study", definition, database, tmp_path)
    programs = members.Programs.load(config)
    assert worker.Worker(study, database, definition, programs, trials=9, population=4, sampler="tpe", rounds=1,
                         test=False, stop=lambda: False).run()  # fmt: skip
    for trial in study.trials:
        own = {"num_epochs": trial.params["num_epochs"]}
        seeds = [members.with_fields(config, {**own, "seed": seed}) for seed in (5, 6)]
        population = members.Population(seeds, programs)
        population.advance(1.0, np.ones(2, bool))
        losses = [records[-1].loss for records in population.records]
        assert losses[0] != losses[1] and trial.user_attrs["curve"][-1][3] == pytest.approx(np.mean(losses), rel=1e-3)
        assert trial.value == pytest.approx(np.mean([1 - records[-1].accuracy for records in population.records]))
    assert len(study.trials) == 2


def test_repeats_and_seeds_of_the_space_exclude_each_other():
    ranges = {"seed": space.choice(0, 1)}
    with pytest.raises(UserError, match="use either"):
        space.define(SimpleNamespace(search_space=lambda: ranges), default_config(), repeats=2)
