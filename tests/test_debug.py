import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import cli, data, debug, devices, train
from tests.commands import command
from tests.test_train import BATCH, EXAMPLES, STEPS_PER_EPOCH, config_for

HUGE = 3e38


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (EXAMPLES, 28, 28), np.uint8), random.integers(0, 10, EXAMPLES).astype(np.int32)


def run(config, examples, change=lambda params: None, num_classes=10):
    """An epoch of checked steps, from fresh parameters that `change` was let loose on."""
    mesh = devices.make_mesh()
    steps = train.make_train_steps(config, num_classes, STEPS_PER_EPOCH, mesh)
    steps = debug.checked(steps, config, num_classes, STEPS_PER_EPOCH, mesh)
    state = train.init_state(config, num_classes, 0)
    change(state.params)
    order = np.arange(EXAMPLES, dtype=np.int32).reshape(STEPS_PER_EPOCH, BATCH)
    arguments = (train.hyperparameters(config), 0, *devices.put((*examples, order), mesh))
    state, _ = steps(state, *arguments, 0, 0)
    return steps(state, *arguments, 0, STEPS_PER_EPOCH)[0]


def scale(layer, name, factor):
    def change(params):
        where, leaf = (params[layer], name) if name else (params, layer)
        where[leaf] = where[leaf] * factor

    return change


@pytest.mark.parametrize(
    ("fields", "change", "found"),
    [
        ({}, scale("conv0_kernel", None, HUGE), "output of layer conv0"),
        ({}, scale("conv1_kernel", None, HUGE), "output of layer conv1"),
        ({"model.batch_norm": True}, scale("norm1", "scale", HUGE), "output of layer norm1"),
        ({"optimizer.accumulate_steps": 4}, scale("dense0", "kernel", HUGE), "output of layer dense0"),
        ({}, scale("logits", "kernel", HUGE), "output of layer logits"),
        # Logits of order 1, as a tiny number times a huge one: only the gradient overflows on its way back.
        (
            {"model.dropout_rate": 0.0},
            lambda params: (scale("dense0", "kernel", 1e-30)(params), scale("logits", "kernel", HUGE)(params)),
            "gradient of layer ",
        ),
        ({"optimizer.learning_rate": HUGE}, lambda params: None, "updated parameters of layer "),
        (
            {"optimizer.name": "adam"},
            lambda params: (scale("dense0", "kernel", 1e-30)(params), scale("logits", "kernel", 1e30)(params)),
            "optimizer's averages for layer dense0",
        ),
    ],
)
def test_names_the_layer_where_a_number_is_not_finite(examples, fields, change, found):
    with pytest.raises(cli.RunError, match=f"^step 1, in epoch 1: the .*{found}") as caught:
        run(config_for(**fields), examples, change)
    assert "\n" not in str(caught.value)


def test_checks_change_nothing(examples):
    config = config_for(**{"model.batch_norm": True, "optimizer.accumulate_steps": 2, "optimizer.name": "adam"})
    mesh = devices.make_mesh()
    order = np.arange(EXAMPLES, dtype=np.int32).reshape(STEPS_PER_EPOCH, BATCH)
    arguments = (train.hyperparameters(config), 0, *devices.put((*examples, order), mesh), 0, STEPS_PER_EPOCH)
    plain, _ = train.make_train_steps(config, 10, STEPS_PER_EPOCH, mesh)(train.init_state(config, 10, 0), *arguments)
    jax.tree.map(np.testing.assert_array_equal, plain, run(config, examples))


def test_a_label_out_of_range_is_found(examples):
    images, labels = examples
    with pytest.raises(cli.RunError, match="a label is out of range"):
        run(config_for(), (images, np.where(labels == 3, 10, labels)), scale("logits", "kernel", HUGE))


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (np.float32, np.int32, r"images are float32\[80, 28, 28\], where uint8\[\*any 28 28\] is due"),
        (np.uint8, np.int16, r"labels are int16\[80\], where int32\[\*any\] is due"),
    ],
)
def test_types_and_shapes_are_checked_before_the_first_step(examples, images, labels, found):
    with pytest.raises(cli.RunError, match=found):
        run(config_for(), (examples[0].astype(images), examples[1].astype(labels)))


def test_an_all_black_image_and_a_batch_of_one_are_trained_on(examples):
    black = np.zeros_like(examples[0]), examples[1]
    fields = {"model.batch_norm": True, "augment.rotation": 9.0, "augment.elastic_alpha": 3.0, "optimizer.name": "adam"}
    assert train.all_finite(run(config_for(**fields), black))

    config = config_for(**fields, batch_size=1)
    state = train.init_state(config, 10, 0)
    mesh = devices.make_mesh()
    steps = train.make_train_steps(config, 10, EXAMPLES, mesh)
    order = np.arange(EXAMPLES, dtype=np.int32)[:, None]
    for kind in (black, examples):
        arguments = devices.put((*kind, order), mesh)
        state, last = steps(state, train.hyperparameters(config), 0, *arguments, 0, 5)
        assert train.all_finite(state) and np.isfinite(last["sums"].loss)


def test_all_finite_sees_every_leaf():
    good = {"a": jnp.ones(3), "b": (jnp.zeros((2, 2)), jnp.arange(3))}
    assert train.all_finite(good)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not train.all_finite(good | {"a": good["a"].at[1].set(bad)})


def test_labels_beyond_the_classes_are_refused(digits_data_dir, monkeypatch):
    monkeypatch.setitem(data.CLASS_NAMES, "digits", data.CLASS_NAMES["digits"][:9])
    config = config_for(dataset="digits", data_dir=str(digits_data_dir))
    with pytest.raises(cli.UserError, match="labels beyond the 9 classes: delete it"):
        data.load(config)


def test_the_command_names_the_layer_where_a_run_without_it_stopped(digits_data_dir, tmp_path):
    """Overflow that a loss does not show: parameters are infinite only after the last step before the checkpoint."""
    arguments = (
        "--config=configs/digits.py",
        f"--config.data_dir={digits_data_dir}",
        "--config.train_examples=64",
        "--config.batch_size=64",  # one step an epoch
        "--config.num_epochs=2",
        "--config.validation_examples=0",
        "--config.model.channels=(2,)",
        "--config.model.dense=()",
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=3e38",
        "--config.optimizer.warmup_epochs=0.0",
        f"--workdir={tmp_path / 'run'}",
    )
    ended = command("mnist_flax.main", *arguments, status=1)
    assert "parameters or the optimizer's averages became NaN or infinite at step 1" in ended.stderr
    assert "--config.debug=true" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not list((tmp_path / "run" / "checkpoints").iterdir())  # nothing bad was saved
    ended = command("mnist_flax.main", *arguments, "--config.debug=true", status=1)
    assert "error: step 1, in epoch 1: the updated parameters of layer" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
