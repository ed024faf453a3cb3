import json

import jax
import numpy as np
import pytest

from mnist_flax.data.feed import Block
from mnist_flax.runtime import cli, devices
from mnist_flax.training import debug, step
from mnist_flax.training.state import all_finite, hyperparameters, init_state
from tests.commands import command, records
from tests.training.test_step import BATCH, EXAMPLES, STEPS_PER_EPOCH, config_for, random_examples

HUGE = 3e38


@pytest.fixture(scope="module")
def examples():
    return random_examples()


# One program serves all cases: parameters and hyperparameters are its arguments.
CONFIG = config_for(
    **{"model.batch_norm": True, "model.dropout_rate": 0.0, "optimizer.accumulate_steps": 2, "optimizer.name": "adam"}
)


@pytest.fixture(scope="module")
def run(examples):
    """`run(images, labels, learning_rate, **factors)`: an epoch of checked steps, some parameters scaled at first."""
    mesh = devices.make_mesh()
    steps = step.make_train_steps(CONFIG, 10, STEPS_PER_EPOCH, mesh)
    steps = debug.checked(steps, CONFIG, 10, STEPS_PER_EPOCH, mesh)
    order = np.arange(EXAMPLES, dtype=np.int32).reshape(STEPS_PER_EPOCH, BATCH)

    def run(images=examples[0], labels=examples[1], learning_rate=0.1, **factors):
        state = init_state(CONFIG, 10, 0)
        for name, factor in factors.items():
            params = state.params
            *groups, leaf = name.split("__")
            for group in groups:
                params = params[group]
            params[leaf] = params[leaf] * factor
        hyper = hyperparameters(CONFIG) | {"optimizer.learning_rate": learning_rate}
        block = Block(*devices.put((images, labels, order), mesh), 0, 0)
        state, _ = steps(state, hyper, 0, block)
        return steps(state, hyper, 0, block._replace(stop=STEPS_PER_EPOCH))[0]

    return run


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"conv0_kernel": HUGE}, "output of layer conv0"),
        ({"conv1_kernel": HUGE}, "output of layer conv1"),
        ({"norm1__scale": HUGE}, "output of layer norm1"),
        ({"dense0__kernel": HUGE}, "output of layer dense0"),
        ({"logits__kernel": HUGE}, "output of layer logits"),
        # Logits are of order 1 or 1e18, as a tiny number times a huge one: what goes back is larger.
        ({"norm1__scale": 1e10, "dense0__kernel": 1e-30, "logits__kernel": HUGE}, "gradient of layer dense0"),
        ({"dense0__kernel": 1e-30, "logits__kernel": 1e30}, "optimizer's averages for layer dense0"),
        ({"learning_rate": np.inf}, "updated parameters of layer conv0"),
    ],
)
def test_names_the_layer_where_a_number_is_not_finite(run, change, found):
    with pytest.raises(cli.RunError, match=f"^step 1, in epoch 1: the .*{found}") as caught:
        run(**change)
    assert "\n" not in str(caught.value)


def test_checks_change_nothing(run, examples):
    mesh = devices.make_mesh()
    order = np.arange(EXAMPLES, dtype=np.int32).reshape(STEPS_PER_EPOCH, BATCH)
    block = Block(*devices.put((*examples, order), mesh), 0, STEPS_PER_EPOCH)
    steps = step.make_train_steps(CONFIG, 10, STEPS_PER_EPOCH, mesh)
    plain, _ = steps(init_state(CONFIG, 10, 0), hyperparameters(CONFIG), 0, block)
    jax.tree.map(np.testing.assert_array_equal, plain, run())


def test_a_label_out_of_range_is_found(run, examples):
    labels = np.where(examples[1] == 3, 10, examples[1]).astype(np.int32)
    with pytest.raises(cli.RunError, match="a label is out of range"):
        run(labels=labels, logits__kernel=HUGE)


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (np.float32, np.int32, r"images are float32\[80, 28, 28\], where uint8\[\*any 28 28\] is due"),
        (np.uint8, np.int16, r"labels are int16\[80\], where int32\[\*any\] is due"),
    ],
)
def test_types_and_shapes_are_checked_before_the_first_step(run, examples, images, labels, found):
    with pytest.raises(cli.RunError, match=found):
        run(examples[0].astype(images), examples[1].astype(labels))


def test_an_all_black_image_and_a_batch_of_one_are_trained_on(run, examples):
    black = np.zeros_like(examples[0])
    assert all_finite(run(images=black))

    fields = {"model.batch_norm": True, "augment.rotation": 9.0}
    config = config_for(**fields, batch_size=1)
    state = init_state(config, 10, 0)
    mesh = devices.make_mesh()
    steps = step.make_train_steps(config, 10, EXAMPLES, mesh)
    order = np.arange(EXAMPLES, dtype=np.int32)[:, None]
    for images in (black, examples[0]):
        block = Block(*devices.put((images, examples[1], order), mesh), 0, 5)
        state, last = steps(state, hyperparameters(config), 0, block)
        assert all_finite(state) and np.isfinite(last["sums"].loss)


@pytest.fixture(scope="module")
def tiny(digits_data_dir):
    return (
        "--config=configs/digits.py",
        f"--config.data_dir={digits_data_dir}",
        "--config.train_examples=64",
        "--config.batch_size=64",  # one step an epoch
        "--config.num_epochs=2",
        "--config.validation_examples=0",
        "--config.model.channels=(2,)",
        "--config.model.dense=()",
        "--config.optimizer.name=sgd",
        "--config.optimizer.warmup_epochs=0.0",
    )


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_the_command_names_the_layer_where_a_run_without_it_stopped(tiny, tmp_path, optimizer):
    """Overflow that a loss does not show: parameters are infinite only after the last step before the checkpoint."""
    workdir = tmp_path / "run"
    overflow = ("--config.optimizer.learning_rate=3e38", "--config.optimizer.weight_decay=1000.0")
    arguments = (*tiny, *overflow, f"--config.optimizer.name={optimizer}", f"--workdir={workdir}")
    ended = command("mnist_flax.main", *arguments, status=1)
    assert "parameters or the optimizer's averages became NaN or infinite at step 1" in ended.stderr
    assert "--config.debug=true" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not list((workdir / "checkpoints").iterdir())  # nothing bad was saved
    ended = command("mnist_flax.main", *arguments, "--config.debug=true", status=1)
    assert "error: step 1, in epoch 1: the updated parameters of layer" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_run_without_validation_examples_is_whole_in_debug_mode_too(tiny, tmp_path):
    command("mnist_flax.main", *tiny, "--config.debug=true", f"--workdir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_accuracy"] is None and 0 <= summary["test_accuracy"] <= 1
    assert {record["split"] for record in records(tmp_path / "run")} == {"train"}
