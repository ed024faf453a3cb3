import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mnist_flax.data.feed import Block
from mnist_flax.models.cnn import scale_pixels
from mnist_flax.runtime.config import default_config
from mnist_flax.runtime.devices import make_mesh
from mnist_flax.training import step
from mnist_flax.training.state import hyperparameters, init_state

BATCH, EXAMPLES = 16, 80
STEPS_PER_EPOCH = EXAMPLES // BATCH


def config_for(**fields):
    config = default_config()
    config.model.channels, config.model.pool_sizes, config.model.dense = (3, 4), (2,), (8,)
    config.optimizer.ema_decay = 0.0
    for name in config.augment:
        config.augment[name] = 0.0
    config.model.compute_dtype = "float32"
    config.batch_size, config.num_epochs = BATCH, 2
    config.optimizer.name, config.optimizer.schedule = "sgd", "constant"
    config.optimizer.learning_rate, config.optimizer.warmup_epochs = 0.1, 0.0
    config.update_from_flattened_dict(fields)
    return config


def random_examples():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (EXAMPLES, 28, 28), np.uint8), random.integers(0, 10, EXAMPLES).astype(np.int32)


@pytest.fixture(scope="module")
def examples():
    return random_examples()


def steps(config, examples, start=0, stop=STEPS_PER_EPOCH, state=None):
    """Runs steps [start, stop) of the first epoch over examples in order."""
    mesh = make_mesh()
    if state is None:
        state = init_state(config, 10, config.seed)
    images, labels = jax.device_put(examples, jax.NamedSharding(mesh, P()))
    order = jnp.arange(EXAMPLES, dtype=jnp.int32).reshape(STEPS_PER_EPOCH, BATCH)
    run = step.make_train_steps(config, 10, STEPS_PER_EPOCH, mesh)
    return run(state, hyperparameters(config), config.seed, Block(images, labels, order, start, stop)), run


def reference_step(config, params, images, labels):
    """One SGD step with lax convolutions, reduce_window and plain autodiff: nothing of conv.py."""

    def loss(params):
        x = scale_pixels(images)[..., None]
        for i in range(2):
            x = jax.lax.conv_general_dilated(
                x, params[f"conv{i}_kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.maximum(x + params[f"conv{i}_bias"], 0)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = x.reshape(len(images), -1)
        x = jnp.maximum(x @ params["dense0"]["kernel"] + params["dense0"]["bias"], 0)
        logits = x @ params["logits"]["kernel"] + params["logits"]["bias"]
        smooth = config.optimizer.label_smoothing
        targets = jnp.eye(10)[labels] * (1 - smooth) + smooth / 10
        return -(targets * jax.nn.log_softmax(logits)).sum(1).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return value, grads


@pytest.mark.parametrize("head", ["flatten", "average"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_bfloat16_runs_with_every_head(examples, head, batch_norm):
    """XLA chooses layouts by what surrounds a product, and some it cannot multiply in bfloat16."""
    config = config_for(**{"model.compute_dtype": "bfloat16", "model.head": head, "model.batch_norm": batch_norm})
    config.model.dense, config.optimizer.learning_rate = (), 1e-3
    (_, last), _ = steps(config, examples, 0, 2)
    assert int(last["step"]) == 2 and 1.5 < float(last["sums"].loss) / int(last["sums"].examples) < 5.0


def test_a_step_is_the_one_written_with_lax_alone(examples):
    config = config_for(**{"model.dropout_rate": 0.0, "optimizer.label_smoothing": 0.1, "optimizer.momentum": 0.0})
    start = init_state(config, 10, 0)
    params = jax.tree.map(np.asarray, start.params)
    (state, last), _ = steps(config, examples, 0, 1)
    loss, grads = reference_step(config, params, examples[0][:BATCH], examples[1][:BATCH])
    assert float(last["sums"].loss) / BATCH == pytest.approx(float(loss), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)
    assert int(last["step"]) == 1 and int(last["sums"].examples) == BATCH


def test_parts_of_a_batch_add_up_to_the_whole(examples):
    (whole, _), _ = steps(config_for(), examples)
    (parts, _), _ = steps(config_for(**{"optimizer.accumulate_steps": 4}), examples)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole.params, parts.params)
    np.testing.assert_array_equal(whole.sums.correct, parts.sums.correct)


def test_how_steps_are_cut_into_calls_changes_no_bit_and_compiles_nothing(examples):
    config = config_for(
        **{"model.batch_norm": True, "optimizer.ema_decay": 0.9, "augment.rotation": 9.0, "optimizer.name": "adam"}
    )
    (whole, _), run = steps(config, examples)
    mesh = make_mesh()
    images, labels = jax.device_put(examples, jax.NamedSharding(mesh, P()))
    order = jnp.arange(EXAMPLES, dtype=jnp.int32).reshape(STEPS_PER_EPOCH, BATCH)
    state = init_state(config, 10, 0)
    for start, stop in ((0, 0), (0, 1), (1, 4), (4, 5)):
        state, _ = run(state, hyperparameters(config), 0, Block(images, labels, order, start, stop))
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    assert run.__wrapped__._cache_size() <= 2  # a fresh state lies on one device, a trained one on the mesh


def test_metrics_are_summed_over_an_epoch_and_start_anew(examples):
    config = config_for()
    (state, last), _ = steps(config, examples)
    assert int(last["sums"].examples) == EXAMPLES
    (_, last), _ = steps(config, examples, 0, 1, state)
    assert int(last["sums"].examples) == BATCH and int(last["step"]) == STEPS_PER_EPOCH + 1


def test_training_stops_at_the_step_whose_loss_is_not_finite(examples):
    config = config_for(**{"optimizer.learning_rate": 3e38})
    (state, last), _ = steps(config, examples)
    assert not np.isfinite(last["sums"].loss)
    assert int(last["step"]) == 2  # the first step spoils the parameters, the second sees it
    (_, after), _ = steps(config, examples, 2, 5, state)
    assert int(after["step"]) == 2


def test_randomness_of_a_step_depends_on_seed_step_and_position():
    positions = jnp.arange(4)
    draw = lambda *key: np.asarray(jax.random.key_data(step.example_keys(*key, positions)))  # noqa: E731
    base = draw(0, 1, 5)
    np.testing.assert_array_equal(base, draw(0, 1, 5))
    for other in (draw(1, 1, 5), draw(0, 2, 5), draw(0, 1, 6)):
        assert not (base == other).any(axis=1).any()
    shifted = jax.random.key_data(step.example_keys(0, 1, 5, positions + 2))
    np.testing.assert_array_equal(base[2:], shifted[:2])
