import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.models.cnn import Ensemble, drop, make_model, scale_pixels
from mnist_flax.runtime.config import default_config
from mnist_flax.training.state import hyperparameters


def build(**fields):
    config = default_config()
    with config.unlocked():
        for key, value in fields.items():
            config.model[key] = value
    return make_model(config.model, hyperparameters(config), 10)


def images(count=3):
    return jax.random.uniform(jax.random.key(5), (count, 28, 28))


def test_default_network_has_its_known_size():
    """Change the number only together with the architecture in configs/default.py."""
    variables = build().init(jax.random.key(0), images())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 458_570
    assert build().apply(variables, images()).shape == (3, 10)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"padding": "VALID", "kernel_sizes": (5, 2, 3)},
        {"batch_norm": True, "logits_batch_norm": True},
        {"channels": (4, 6, 8), "pool_sizes": (2, 1, 3), "head": "average", "dense": ()},
    ],
)
def test_implementations_agree_on_the_same_parameters(fields):
    """A model trained as matrix products can be used with lax convolutions, and the other way round."""
    matmul, plain = (build(conv=impl, compute_dtype="float32", **fields) for impl in ("matmul", "lax"))
    variables = matmul.init(jax.random.key(1), images())
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, plain.init(jax.random.key(1), images()))
    expected = plain.apply(variables, images())
    np.testing.assert_allclose(matmul.apply(variables, images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits_batch_norm", [False, True])
def test_logits_are_float32_whatever_computes_them(logits_batch_norm):
    """In bfloat16 a logit near 8 would be rounded to a 32nd, and the loss and its gradient with it."""
    model = build(batch_norm=True, logits_batch_norm=logits_batch_norm, compute_dtype="bfloat16")
    variables = model.init(jax.random.key(1), images())
    keys = jax.random.split(jax.random.key(2), 3)
    trained, _ = model.apply(variables, images(), dropout_keys=keys, mutable=["batch_stats"])
    assert model.apply(variables, images()).dtype == trained.dtype == jnp.float32
    assert not np.array_equal(trained, trained.astype(jnp.bfloat16))


def together():
    return Ensemble(tuple(build(channels=(n,), pool_sizes=(2,), dense=()) for n in (2, 3)))


@pytest.mark.parametrize("make", [build, together])
def test_images_may_have_a_channel_and_are_refused_by_name(make):
    network, batch = make(), images()
    variables = network.init(jax.random.key(0), batch)
    expected = network.apply(variables, batch)
    np.testing.assert_array_equal(network.apply(variables, batch[..., None]), expected)
    assert network.apply(variables, batch[:0]).shape == (0, 10)
    for dtype in (np.uint8, np.int32, bool):
        with pytest.raises(TypeError, match=rf"images are {np.dtype(dtype)}, not floats .*: divide"):
            network.apply(variables, np.zeros((3, 28, 28), dtype))
    for shape in ((28, 28), (3, 784), (3, 1, 28, 28), (3, 28, 28, 3), (1, 3, 28, 28, 1)):
        with pytest.raises(ValueError, match=re.escape(f"images have shape {shape}: give [n, height, width]")):
            network.apply(variables, np.zeros(shape, np.float32))


def test_dropout_drops_its_share_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 64)
    out = np.asarray(drop(keys, jnp.ones((64, 1000)), 0.3))
    share = 77 / 256  # the nearest to 0.3
    np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - share)], rtol=1e-6)
    assert np.mean(out == 0) == pytest.approx(share, abs=0.01)  # 64,000 draws: five standard deviations


def test_dropout_of_an_example_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(0), 8)
    x = jax.random.normal(jax.random.key(1), (8, 15))
    np.testing.assert_array_equal(drop(keys, x, 0.5)[3:], drop(keys[3:], x[3:], 0.5))


def test_training_mode_is_random_by_key_only():
    model = build(dropout_rate=0.2)
    variables = model.init(jax.random.key(0), images())
    keys = jax.random.split(jax.random.key(3), 3)
    first, second = (model.apply(variables, images(), dropout_keys=keys) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, model.apply(variables, images()))


def test_pixels_become_zero_to_one():
    np.testing.assert_array_equal(scale_pixels(np.array([0, 51, 255], np.uint8)), np.float32([0, 0.2, 1]))
