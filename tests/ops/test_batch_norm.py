"""Batch norm in training, against NumPy in float64 and against Flax's own module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from mnist_flax.ops import conv
from tests.models.test_cnn import build, images

EPSILON = nn.BatchNorm.epsilon


def reference(x, scale, bias, d_y):
    """Output, mean, variance, and the gradients of the output's inner product with `d_y`: NHWC, by the chain rule."""
    axes, count = (0, 1, 2), x.size / x.shape[3]
    mean, variance = x.mean(axes), x.var(axes)
    deviation = np.sqrt(variance + EPSILON)
    normal = (x - mean) / deviation
    d_normal = d_y * scale
    d_variance = (d_normal * (x - mean)).sum(axes) * -0.5 / deviation**3
    d_mean = -d_normal.sum(axes) / deviation
    d_x = d_normal / deviation + d_variance * 2 * (x - mean) / count + d_mean / count
    return scale * normal + bias, mean, variance, d_x, (d_y * normal).sum(axes), d_y.sum(axes)


def computed(x, scale, bias, d_y, impl, dtype):
    """The same by the module under test, from and to NHWC."""

    @jax.jit
    def run(x, scale, bias, d_y):
        def norm(x, scale, bias):
            x = conv.to_internal(x, impl)
            y, *statistics = conv.batch_norm(x, scale, bias, EPSILON, batch_axis=None, impl=impl)
            return conv.from_internal(y, impl), statistics

        y, pullback, statistics = jax.vjp(norm, x, scale, bias, has_aux=True)
        return y, *statistics, *pullback(d_y)

    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64(dtype == jnp.float64):
        found = run(
            *(jnp.asarray(a, t) for a, t in zip((x, scale, bias, d_y), (dtype, wide, wide, dtype), strict=True))
        )
    assert [a.dtype for a in found] == [dtype, wide, wide, dtype, wide, wide]
    return [np.asarray(a, np.float64) for a in found]


def errors(shape, seed, impl, dtype, shift=0.5):
    """The errors of all of them, relative to the largest number of each."""
    rng = np.random.default_rng(seed)
    channels = shape[3]
    spread = rng.uniform(0.5, 2, channels)
    arrays = shift + spread * rng.standard_normal(shape), rng.standard_normal(channels), rng.standard_normal(channels)
    x, scale, bias, d_y = *arrays, rng.standard_normal(shape)
    if dtype == jnp.bfloat16:  # take what bfloat16 holds, to see the errors of the computation alone
        x, d_y = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, d_y))
    expected = reference(x, scale, bias, d_y)
    found = computed(x, scale, bias, d_y, impl, dtype)
    return [np.abs(f - e).max() / (np.abs(e).max() + 1e-2) for f, e in zip(found, expected, strict=True)]


shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))


@pytest.mark.parametrize("impl", ["matmul", "lax"])
@settings(deadline=None, max_examples=6)
@given(shape=shapes.filter(lambda shape: np.prod(shape[:3]) > 3), seed=st.integers(0, 2**31))
@example((8, 6, 5, 3), 0)
def test_agrees_in_float64(impl, shape, seed):
    assert max(errors(shape, seed, impl, jnp.float64)) < 1e-8  # a variance may be far smaller than epsilon allows for


@pytest.mark.parametrize("impl", ["matmul", "lax"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_agrees_in_narrower_types(impl, dtype, tolerance):
    assert max(errors((32, 7, 6, 4), 1, impl, dtype)) < tolerance


def test_a_mean_far_from_zero_costs_few_digits():
    """Centred before it is scaled: what is lost is what the mean of squares loses, (mean / deviation)^2 roundings."""
    assert max(errors((32, 7, 6, 4), 2, "matmul", jnp.float32, shift=30)) < 1e-2


def test_a_constant_channel_is_its_bias():
    x, d_y = np.full((4, 3, 3, 1), 2.0), np.random.default_rng(0).standard_normal((4, 3, 3, 1))
    y, mean, variance, d_x, d_scale, d_bias = computed(x, np.ones(1), np.full(1, 0.5), d_y, "matmul", jnp.float32)
    found, expected = (y, mean, variance, d_scale), (0.5, 2, 0, 0)
    for actual, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, right, atol=1e-3)
    np.testing.assert_allclose(d_x, (d_y - d_y.mean()) / np.sqrt(EPSILON), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(d_bias, [d_y.sum()], rtol=1e-5)


def test_statistics_have_no_gradient():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 3, 2)), jnp.float32)
    for impl in ("matmul", "lax"):

        def of_statistics(x, impl=impl):
            x = conv.to_internal(x, impl)
            return sum(
                s.sum() for s in conv.batch_norm(x, jnp.ones(2), jnp.zeros(2), EPSILON, batch_axis=None, impl=impl)[1:]
            )

        np.testing.assert_array_equal(jax.grad(of_statistics)(x), 0)


@pytest.mark.parametrize("impl", ["matmul", "lax"])
def test_parts_of_a_batch_share_their_statistics(impl):
    """Two parts under one axis name, which `pmean` averages over, are one batch."""
    rng = np.random.default_rng(0)
    x, d_y = (jnp.asarray(rng.standard_normal((6, 4, 4, 3)), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.standard_normal(3), jnp.float32) for _ in range(2))
    expected = reference(*(np.asarray(a, np.float64) for a in (x, scale, bias, d_y)))

    def part(x, d_y):
        def norm(x, scale, bias):
            x = conv.to_internal(x, impl)
            y, *statistics = conv.batch_norm(x, scale, bias, EPSILON, batch_axis="parts", impl=impl)
            return conv.from_internal(y, impl), statistics

        y, pullback, statistics = jax.vjp(norm, x, scale, bias, has_aux=True)
        d_x, *d_parameters = pullback(d_y)
        return y, *statistics, d_x, *lax.psum(d_parameters, "parts")

    halves = (a.reshape(2, 3, 4, 4, 3) for a in (x, d_y))
    y, mean, variance, d_x, d_scale, d_bias = jax.jit(jax.vmap(part, axis_name="parts"))(*halves)
    found = y.reshape(x.shape), mean[0], variance[0], d_x.reshape(x.shape), d_scale[0], d_bias[0]
    for actual, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, right, rtol=1e-4, atol=1e-5)


class FlaxBlock(nn.Module):
    """Convolution, norm, relu and maxima as Flax has them, with the names of our model."""

    kernel_shape: tuple
    momentum: float

    @nn.compact
    def __call__(self, x):
        kernel = self.param("conv0_kernel", nn.initializers.he_normal(), self.kernel_shape)
        x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = nn.BatchNorm(use_running_average=False, momentum=self.momentum, name="norm0")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(10, name="logits")(x)


@pytest.mark.parametrize("impl", ["matmul", "lax"])
def test_a_network_trains_as_with_flaxs_module(impl):
    """Logits, averages and gradients in training mode, with the same variables."""
    model = build(
        **{"channels": (6,), "pool_sizes": (2,), "dense": (), "batch_norm": True, "batch_norm_momentum": 0.8},
        **{"dropout_rate": 0.0, "compute_dtype": "float32", "conv": impl},
    )
    batch = images(12)
    variables = model.init(jax.random.key(0), batch)
    stats = jax.tree.map(lambda a: a + 0.25, variables["batch_stats"])
    theirs = FlaxBlock(variables["params"]["conv0_kernel"].shape, 0.8)
    keys = jax.random.split(jax.random.key(1), 12)
    weights = np.random.default_rng(2).standard_normal((12, 10))

    def objective(apply):
        def of(params):
            logits, updates = apply({"params": params, "batch_stats": stats})
            return (logits * weights).sum(), (logits, updates)

        return jax.jit(jax.value_and_grad(of, has_aux=True))(variables["params"])

    ours = objective(lambda v: model.apply(v, batch, dropout_keys=keys, mutable=["batch_stats"]))
    expected = objective(lambda v: theirs.apply(v, batch[..., None], mutable=["batch_stats"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, expected)
