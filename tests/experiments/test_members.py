import jax
import numpy as np
import pytest

from mnist_flax.data import datasets
from mnist_flax.experiments.research import members
from mnist_flax.runtime import cli, devices
from mnist_flax.runtime.config import default_config
from mnist_flax.training import loop, photometric

SMALL = {
    "dataset": "digits",
    "batch_size": 32,
    "num_epochs": 2,
    "validation_examples": 200,
    "model.channels": (3, 4),
    "model.pool_sizes": (2,),
    "model.dense": (8,),
    "model.compute_dtype": "float32",
    "optimizer.warmup_epochs": 0.5,
    "augment.rotation": 0.0,
    "augment.shift": 0.0,
    "augment.zoom": 0.0,
    "augment.shear": 0.0,
    "augment.strokes": 1.0,
}
# What one program serves: everything that differs here is an argument of it.
VARIED = [
    {"seed": 3, "optimizer.learning_rate": 0.01, "model.dropout_rate": 0.0, "optimizer.ema_decay": 0.0},
    {"seed": 4, "optimizer.weight_decay": 0.01, "optimizer.label_smoothing": 0.1, "optimizer.b1": 0.8},
    {"seed": 5, "train_examples": 100, "num_epochs": 5, "optimizer.clip_norm": 0.5, "optimizer.final_scale": 0.3},
    {"seed": 6, "augment.strokes": 2.0, "model.dropout_rate": 0.1, "optimizer.ema_decay": 0.9},
]


def config_for(data_dir, **fields):
    return members.with_fields(default_config(), {**SMALL, "data_dir": str(data_dir), **fields})


@pytest.fixture(scope="module")
def configs(digits_data_dir):
    return [config_for(digits_data_dir, **fields) for fields in VARIED]


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """Each member trained by itself, by the loop that `mnist_flax.main` runs."""
    results = []
    for config in configs:
        directory = tmp_path_factory.mktemp("alone")
        results.append(loop.fit(config, datasets.load(config), 10, directory, devices.make_mesh(), lambda: False))
    return results


def programs_for(config, mapping="map"):
    everything = members.with_fields(config, {"train_examples": None})
    return members.Programs(datasets.load(everything), 10, members.make_mesh(), mapping, config.eval_batch_size)


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_a_member_is_the_model_that_is_trained_alone(mapping, configs, alone):
    population = members.Population(configs, programs_for(configs[0], mapping), capacity=6)
    everyone = np.ones(len(configs), bool)
    for i in range(1, 6):
        population.advance(i / 5, everyone)
    for config, state, records, result in zip(configs, population.states(), population.records, alone, strict=True):
        assert int(state.step) == int(result.state.step)
        assert jax.tree.all(
            jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-3, atol=2e-4), state.params, result.state.params)
        )
        if config.optimizer.ema_decay:
            averages = (state.ema, result.state.ema)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), *averages)
        last = [record for record in result.records if record["split"] == "validation"][-1]
        assert records[-1].epoch == last["epoch"]
        assert records[-1].loss == pytest.approx(last["loss"], rel=1e-3)
        assert records[-1].accuracy == pytest.approx(last["accuracy"], abs=0.0051)  # one example may fall either way


def test_members_share_a_program_unless_shapes_or_names_differ(configs, digits_data_dir):
    assert len({members.program_key(config) for config in configs}) == 1
    apart = [
        {"model.channels": (3, 5)},
        {"batch_size": 16},
        {"optimizer.name": "sgd"},
        {"optimizer.schedule": "constant"},
        {"augment.rotation": 5.0},
        {"augment.strokes": 0.0},
    ]
    keys = {members.program_key(config_for(digits_data_dir, **fields)) for fields in apart}
    assert len(keys | {members.program_key(configs[0])}) == len(apart) + 1
    grey = (config_for(digits_data_dir, **{f"augment.{kind}": 0.1}) for kind in photometric.KINDS)
    assert len({members.program_key(config) for config in grey}) == 1


def test_a_member_that_diverges_is_marked_and_disturbs_no_other(configs, digits_data_dir):
    bad, good = (config_for(digits_data_dir, **{"optimizer.learning_rate": rate}) for rate in (1e38, 1e-3))
    programs = programs_for(configs[0])
    everyone = np.ones(2, bool)
    beside, before = (members.Population([configs[1], other], programs) for other in (bad, good))
    for population in (beside, before):
        population.advance(0.5, everyone)
        population.advance(1.0, everyone)
    assert beside.diverged.tolist() == [False, True]
    assert beside.records[1][-1].step < 10 and len(beside.records[1]) == 1
    assert beside.records[0] == before.records[0]
    assert beside.test()[1] is None and beside.test()[0] == before.test()[0]


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_those_that_are_kept_go_on_as_if_all_were(mapping, configs):
    programs = programs_for(configs[0], mapping)
    whole, halved = (members.Population(configs, programs) for _ in range(2))
    everyone, some = np.ones(4, bool), np.array([False, True, False, True])
    for population in (whole, halved):
        population.advance(0.5, everyone)
    halved.keep(some)
    whole.advance(1.0, everyone)
    halved.advance(1.0, some)
    for i, kept in enumerate(some):
        assert len(halved.records[i]) == (2 if kept else 1)
        if kept:
            assert halved.records[i][1].loss == pytest.approx(whole.records[i][1].loss, rel=1e-3)
            assert halved.test()[i]["accuracy"] == pytest.approx(whole.test()[i]["accuracy"], abs=0.003)


@pytest.mark.parametrize("mapping", ["map", "vmap"])
def test_of_a_program_nobody_may_be_kept(mapping, configs, digits_data_dir):
    other = config_for(digits_data_dir, **{"model.channels": (3, 5)})
    population = members.Population([configs[0], other], programs_for(configs[0], mapping))
    some = np.array([True, False])
    population.advance(0.5, np.ones(2, bool))
    population.keep(some)
    population.advance(1.0, some)
    assert [len(records) for records in population.records] == [2, 1]
    states, scores = population.states(), population.test()
    assert int(states[0].step) == population.records[0][-1].step and states[1] is None
    assert 0 < scores[0]["accuracy"] < 1 and scores[1] is None


def test_batches_of_a_member_are_those_of_its_own_run(configs):
    splits = datasets.load(members.with_fields(configs[2], {"train_examples": None}))
    mine = datasets.load(configs[2])
    member = members.make_member(configs[2], splits)
    order = np.concatenate([datasets.epoch_order(5, epoch, 100, 32) for epoch in range(5)])
    np.testing.assert_array_equal(splits.train.images[member.order(0, 15)], mine.train.images[order])
    np.testing.assert_array_equal(member.order(2, 7), member.order(0, 15)[2:7])


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"patience": 2}, "to its end"),
        ({"checkpoint.select": "best"}, "to its end"),
        ({"validation_examples": 100}, "validation_examples must be the same"),
        ({"train_examples": 10}, "train_examples=10"),
        ({"optimizer.learning_rate": -1.0}, "out of range"),
    ],
)
def test_what_cannot_be_a_member_is_refused(fields, hint, configs, digits_data_dir):
    with pytest.raises(cli.UserError, match=hint):
        members.Population([configs[0], config_for(digits_data_dir, **fields)], programs_for(configs[0]))
