"""No sampler tries a point of a space twice, and every point of a finite one is tried."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest

from mnist_flax.experiments.research import samplers, space, storage, untried, worker
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
