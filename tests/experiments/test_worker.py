import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mnist_flax.experiments.research import members, space, storage, worker
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.config import default_config
from tests.experiments.test_members import config_for
from tests.experiments.test_space import SPACE, define


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target": 0.98}, ["target: 0.99 -> 0.98"]),
        ({"evaluations": 8}, ["evaluations: 0 -> 8"]),
        ({"question": "Which?", "rounds": 2, "sampler": "tpe"}, []),
    ],
)
def test_identity_holds_what_epochs_to_a_target_depend_on(change, told, tmp_path):
    plan = space.Plan(objective="epochs_to_target")
    database = storage.connect(storage.default_url(tmp_path), heartbeat=60)
    worker.join("study", define(search_space=lambda: SPACE, plan=lambda: plan), database, tmp_path)
    other = define(search_space=lambda: SPACE, plan=lambda: replace(plan, **change))
    if told:
        with pytest.raises(UserError, match=re.escape(f"another config ({'; '.join(told)})")):
            worker.join("study", other, database, tmp_path)
    else:
        worker.join("study", other, database, tmp_path)


def test_a_study_goes_on_when_fields_were_added_since(tmp_path):
    definition = define(search_space=lambda: SPACE)
    database = storage.connect(storage.default_url(tmp_path), heartbeat=60)
    study = worker.join("study", definition, database, tmp_path)
    older = definition.identity()
    for key in ("config.model.padding", "repeats"):
        del older[key]
    study.set_user_attr("identity", older)
    worker.join("study", definition, database, tmp_path)
    config = default_config()
    config.model.padding = "VALID"
    other = space.Definition(config, SPACE, [], space.Plan(repeats=2))
    with pytest.raises(UserError, match=r"config\.model\.padding: 'SAME' -> 'VALID'; repeats: 1 -> 2"):
        worker.join("study", other, database, tmp_path)
    study.set_user_attr("identity", {**older, "config.gone": 3})
    with pytest.raises(UserError, match=r"another version .*config\.gone"):
        worker.join("study", definition, database, tmp_path)


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
