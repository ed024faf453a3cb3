from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from mnist_flax import conv

IMPLS = ("matmul", "lax")


def reference(x, kernel, bias, stride, padding, pool_size, pooling):
    """pool(relu(conv + bias)) in NHWC by lax alone, in the type of its arguments."""
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.maximum(y + bias, 0)
    window = (1, pool_size, pool_size, 1)
    if pooling == "max":
        return lax.reduce_window(y, -jnp.inf, lax.max, window, window, "VALID")
    return lax.reduce_window(y, 0.0, lax.add, window, window, "VALID") / pool_size**2


def layer(x, kernel, bias, stride, padding, pool_size, pooling, impl):
    """The same by the module under test, from and to NHWC."""
    y = conv.conv_bias_relu_pool(
        conv.to_internal(x, impl),
        kernel,
        bias,
        stride=stride,
        padding=padding,
        pool_size=pool_size,
        pooling=pooling,
        impl=impl,
    )
    return conv.from_internal(y, impl)


def separate(x, kernel, bias, stride, padding, pool_size, pooling, impl):
    """As a model with batch norm composes it: convolution, something per channel, relu, pooling."""
    y = conv.conv(conv.to_internal(x, impl), kernel, stride=stride, padding=padding, impl=impl)
    y = jax.nn.relu(y + conv.per_channel(bias, impl).astype(y.dtype))
    return conv.from_internal(conv.pool(y, pool_size, pooling), impl)


def value_and_gradients(function, arguments, weights):
    """The output and the gradients of <weights, output> with respect to every argument, jitted, as NumPy."""

    @jax.jit
    def run(arguments):
        output, pullback = jax.vjp(function, *arguments)
        return output, *pullback(weights.astype(output.dtype))

    return [np.asarray(leaf, np.float64) for leaf in run(arguments)]


@st.composite
def cases(draw):
    kernel_size = draw(st.integers(1, 7))
    padding = draw(st.sampled_from(["SAME", "VALID"]))
    smallest = 1 if padding == "SAME" else kernel_size
    height, width = draw(st.integers(smallest, 15)), draw(st.integers(smallest, 15))
    stride = draw(st.integers(1, 2))
    out = [-(-n // stride) if padding == "SAME" else (n - kernel_size) // stride + 1 for n in (height, width)]
    pool_size = draw(st.integers(1, min(3, *out)))
    shape = (draw(st.integers(1, 5)), height, width, draw(st.integers(1, 4)))
    pooling = draw(st.sampled_from(["max", "avg"]))
    features = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape)
    kernel = rng.standard_normal((kernel_size, kernel_size, shape[3], features)) / kernel_size
    bias = rng.standard_normal(features)
    weights = rng.standard_normal((shape[0], out[0] // pool_size, out[1] // pool_size, features))
    return (x, kernel, bias), (stride, padding, pool_size, pooling), weights


def assert_agrees(case, function, impl, dtype, tolerance):
    arguments, options, weights = case
    with jax.enable_x64(True):
        arguments64 = [jnp.asarray(a) for a in arguments]
        expected = value_and_gradients(lambda *a: reference(*a, *options), arguments64, jnp.asarray(weights))
    with jax.enable_x64(dtype == jnp.float64):
        x, kernel, bias = (jnp.asarray(a, jnp.promote_types(dtype, jnp.float32)) for a in arguments)
        actual = value_and_gradients(
            lambda *a: function(*a, *options, impl), (x.astype(dtype), kernel, bias), jnp.asarray(weights)
        )
    for name, a, e in zip(("output", "dx", "dkernel", "dbias"), actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert np.linalg.norm(a - e) <= tolerance * np.linalg.norm(e) + tolerance * 1e-3, name


@pytest.mark.parametrize("function", [layer, separate])
@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None, max_examples=6)
@given(case=cases())
def test_agrees_with_lax_in_float64(function, impl, case):
    assert_agrees(case, function, impl, jnp.float64, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None, max_examples=5)
@given(case=cases())
def test_agrees_with_lax_in_float32(impl, case):
    assert_agrees(case, layer, impl, jnp.float32, 1e-5)


def test_ties_give_the_first_of_the_largest_the_gradient():
    x = jnp.asarray([[1.0, 3.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]])[None, :, :, None]
    for impl in IMPLS:
        gradient = jax.grad(lambda x, impl=impl: conv.pool(conv.to_internal(x, impl), 2, "max").sum())(x)
        np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 1, 0], [0, 0, 0, 0]])


def test_flatten_is_in_nhwc_order():
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    for impl in IMPLS:
        np.testing.assert_array_equal(conv.flatten(conv.to_internal(x, impl), impl), x.reshape(2, -1))


def test_default_is_matrix_products_on_cpu_only():
    assert [conv.default_impl(b) for b in ("cpu", "gpu", "tpu")] == ["matmul", "lax", "lax"]


def loss(kernel, x, weights, impl="matmul"):
    y = conv.conv_bias_relu_pool(
        conv.to_internal(x, impl), kernel, jnp.zeros(kernel.shape[3]), stride=1, padding="SAME", pool_size=2,
        pooling="max", impl=impl,
    )  # fmt: skip
    return (conv.flatten(y, impl) * weights).sum()


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((3, 3, 3, 2, 4)).astype(np.float32)  # three models
    return (
        kernels,
        rng.standard_normal((5, 8, 6, 2)).astype(np.float32),
        rng.standard_normal((5, 48)).astype(np.float32),
    )


def test_gradient_inside_while_loop(problem):
    kernels, x, weights = problem

    def descend(gradient, steps):
        return lax.fori_loop(
            0, steps, lambda _, k: k - 0.01 * gradient(k, x, weights), jnp.asarray(kernels[0])
        )

    actual = jax.jit(partial(descend, jax.grad(loss)))(4)  # a traced count: `while`, not `scan`
    expected = jnp.asarray(kernels[0])
    for _ in range(4):
        expected -= 0.01 * jax.grad(partial(loss, impl="lax"))(expected, x, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["vmap", "map"])
def test_populations(problem, transform):
    kernels, x, weights = problem
    gradient = partial(jax.grad(loss), x=x, weights=weights)
    each = jax.vmap(gradient) if transform == "vmap" else partial(lax.map, gradient)
    expected = [jax.grad(partial(loss, impl="lax"))(k, x, weights) for k in kernels]
    np.testing.assert_allclose(jax.jit(each)(kernels), expected, rtol=1e-4, atol=1e-4)
