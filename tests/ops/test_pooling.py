"""Maxima over windows and their gradients, against `lax.reduce_window`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mnist_flax.ops import conv
from tests.ops.test_conv import IMPLS, layer


def test_ties_give_the_first_of_the_largest_the_gradient():
    x = jnp.asarray([[1.0, 3.0, 2.0, 2.0], [3.0, 3.0, 2.0, 2.0]])[None, :, :, None]
    for impl in IMPLS:
        gradient = jax.grad(lambda x, impl=impl: conv.relu_pool(conv.to_internal(x, impl), 2, impl).sum())(x)
        np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 1, 0], [0, 0, 0, 0]])
    # So does lax's own pooling, and a whole layer.
    window = (1, 2, 2, 1)
    theirs = jax.grad(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID").sum())(x)
    np.testing.assert_array_equal(theirs[0, :, :, 0], [[0, 1, 1, 0], [0, 0, 0, 0]])
    one = partial(layer, kernel=jnp.ones((1, 1, 1, 1)), bias=jnp.ones(1), options=("SAME", 2))
    for impl in IMPLS:
        ours = jax.grad(lambda x, impl=impl: one(x, impl=impl).sum())(x)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_and_pooling_are_the_same_in_all_implementations(size, dtype):
    x = jnp.asarray(np.random.default_rng(size).standard_normal((4, 7, 8, 3)), dtype)  # windows of 2 and 3 leave a rest

    def of(x, impl):
        return conv.from_internal(conv.relu_pool(conv.to_internal(x, impl), size, impl), impl)

    window = (1, size, size, 1)
    expected, their_pullback = jax.vjp(
        lambda x: jax.nn.relu(lax.reduce_window(x, jnp.array(-jnp.inf, dtype), lax.max, window, window, "VALID")), x
    )
    d_y = jnp.asarray(np.random.default_rng(9).standard_normal(expected.shape), dtype)
    for impl in IMPLS:
        y, pullback = jax.vjp(partial(of, impl=impl), x)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(pullback(d_y)[0], their_pullback(d_y)[0])
