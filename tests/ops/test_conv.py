from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from mnist_flax.ops import conv, matmul_conv

IMPLS = ("matmul", "mixed", "lax")
MATRICES = (((1,), (0,)), ((), ()))  # dimension numbers of a product of matrices, for `lax.dot_general`


# The reference: NumPy in float64, loops over taps and windows, gradients by the chain rule.


def reference(x, kernel, bias, weights, padding, pool_size):
    """pool(relu(conv(x) + bias)) in NHWC, and the gradients of its inner product with `weights`."""
    k, outs = kernel.shape[0], []
    lows = []
    for n in x.shape[1:3]:
        total = k - 1 if padding == "SAME" else 0
        outs.append(n + total - k + 1)
        lows.append((total // 2, total - total // 2))
    padded = np.pad(x, ((0, 0), *lows, (0, 0)))

    def seen(i, j):  # what tap (i, j) of every output sees
        return np.s_[:, i : i + outs[0], j : j + outs[1]]

    taps = [(i, j) for i in range(k) for j in range(k)]
    y = sum(padded[seen(i, j)] @ kernel[i, j] for i, j in taps) + bias
    rows, columns = (n // pool_size for n in outs)
    elements = [
        np.s_[:, i : rows * pool_size : pool_size, j : columns * pool_size : pool_size]
        for i in range(pool_size)
        for j in range(pool_size)
    ]
    windows = np.stack([np.maximum(y, 0)[e] for e in elements])

    d_y = np.zeros_like(y)
    for number, e in enumerate(elements):
        d_y[e] = weights * (windows.argmax(0) == number) * (y[e] > 0)
    d_padded = np.zeros_like(padded)
    d_kernel = np.zeros_like(kernel)
    for i, j in taps:
        d_padded[seen(i, j)] += d_y @ kernel[i, j].T
        d_kernel[i, j] = np.einsum("bhwc,bhwf->cf", padded[seen(i, j)], d_y)
    (top, _), (left, _) = lows
    return windows.max(0), d_padded[:, top:, left:][:, : x.shape[1], : x.shape[2]], d_kernel, d_y.sum((0, 1, 2))


def layer(x, kernel, bias, impl, options):
    """The same by the module under test, from and to NHWC."""
    padding, pool_size = options
    x = conv.to_internal(x, impl)
    y = conv.conv_bias_relu_pool(x, kernel, bias, padding=padding, pool_size=pool_size, impl=impl)
    return conv.from_internal(y, impl)


def separate(x, kernel, bias, impl, options):
    """As a model with batch norm composes it: convolution, something per channel, relu and pooling."""
    padding, pool_size = options
    y = conv.conv(conv.to_internal(x, impl), kernel, padding=padding, impl=impl)
    y = y + conv.per_channel(bias, impl).astype(y.dtype)
    return conv.from_internal(conv.relu_pool(y, pool_size, impl), impl)


@st.composite
def cases(draw, most_channels=4):
    kernel_size = draw(st.integers(1, 7))
    padding = draw(st.sampled_from(["SAME", "VALID"]))
    smallest = 1 if padding == "SAME" else kernel_size
    height, width = draw(st.integers(smallest, 15)), draw(st.integers(smallest, 15))
    out = [n if padding == "SAME" else n - kernel_size + 1 for n in (height, width)]
    pool_size = draw(st.integers(1, min(3, *out)))
    batch, channels, features = draw(st.integers(1, 6)), draw(st.integers(1, most_channels)), draw(st.integers(1, 5))
    return (batch, height, width, channels), kernel_size, features, (padding, pool_size), draw(st.integers(0, 2**31))


CLASSIC = ((4, 14, 14, 3), 3, 5, ("SAME", 2), 0)
UNPOOLED = ((3, 14, 13, 2), 5, 4, ("SAME", 1), 0)
CUT = ((4, 11, 14, 1), 4, 3, ("VALID", 3), 0)  # one channel, so fused; an even kernel, no whole windows


def errors(case, function, impl, dtype, tile_bytes=2**22):
    """The relative errors (Frobenius norm) of output and gradients, jitted, against the reference."""
    shape, kernel_size, features, options, seed = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    kernel = rng.standard_normal((kernel_size, kernel_size, shape[3], features)) / kernel_size
    bias = rng.standard_normal(features)
    if dtype == jnp.bfloat16:  # take what bfloat16 holds, to see the errors of the computation alone
        x, kernel = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, kernel))
    layer = partial(function, impl=impl, options=options)
    weights = rng.standard_normal(jax.eval_shape(layer, x, kernel, bias).shape)
    if dtype == jnp.bfloat16:
        weights = np.asarray(jnp.asarray(weights, dtype), np.float64)
    expected = reference(x, kernel, bias, weights, *options)
    wide = jnp.promote_types(dtype, jnp.float32)  # of the parameters
    types = (dtype, wide, wide, dtype)

    @jax.jit
    def run(x, kernel, bias, weights):
        y, pullback = jax.vjp(layer, x, kernel, bias)
        return y, *pullback(weights)

    with jax.enable_x64(dtype == jnp.float64), pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_conv, "TILE_BYTES", tile_bytes)
        actual = run(*(jnp.asarray(a, t) for a, t in zip((x, kernel, bias, weights), types, strict=True)))
    assert [a.dtype for a in actual] == [dtype, dtype, wide, wide]
    assert [a.shape for a in actual] == [e.shape for e in expected]
    differences = [np.asarray(a, np.float64) - e for a, e in zip(actual, expected, strict=True)]
    return [np.linalg.norm(d) / (np.linalg.norm(e) + 1e-3) for d, e in zip(differences, expected, strict=True)]


examples = partial(settings, deadline=None)


@pytest.mark.parametrize("function", [layer, separate])
@examples(max_examples=2)
@given(case=cases())
def test_lax_agrees_in_float64(function, case):
    assert max(errors(case, function, "lax", jnp.float64)) < 1e-12


@pytest.mark.parametrize("batch", [6, 9])  # fewer and more examples than outputs: x or the kernel is transposed
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)])
def test_dense_agrees(batch, dtype, tolerance):
    rng = np.random.default_rng(0)
    shapes = ((batch, 20), (20, 7), (batch, 7))
    x, kernel, weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    exact_x, exact_kernel, exact_weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    for impl in IMPLS:
        y, pullback = jax.vjp(lambda x, w, impl=impl: conv.dense(x, w, MATRICES, impl=impl), x, kernel)
        d_x, d_kernel = pullback(weights)
        assert (y.dtype, d_x.dtype, d_kernel.dtype) == (dtype, dtype, dtype)
        for actual, expected in (
            (y, exact_x @ exact_kernel),
            (d_x, exact_weights @ exact_kernel.T),
            (d_kernel, exact_x.T @ exact_weights),
        ):
            np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_flatten_is_in_nhwc_order():
    x = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    for impl in IMPLS:
        np.testing.assert_array_equal(conv.flatten(conv.to_internal(x, impl), impl), x.reshape(2, -1))


def test_defaults():
    assert [conv.default_impl(b) for b in ("cpu", "gpu", "tpu")] == ["matmul", "mixed", "lax"]


# Inside other transformations


def loss(impl, kernel, x, weights):
    y = layer(x, kernel, jnp.zeros(kernel.shape[3]), impl, ("SAME", 2))
    return (y.reshape(y.shape[0], -1) * weights).sum()


plain_loss = partial(loss, "lax")


@pytest.fixture(params=[("matmul", 2), ("mixed", 1)], ids=lambda param: param[0])
def problem(request, monkeypatch):
    """A loss; kernels of three models, images, weights of the outputs; worked on in several tiles."""
    monkeypatch.setattr(matmul_conv, "TILE_BYTES", 2**12)
    impl, channels = request.param
    rng = np.random.default_rng(0)
    shapes = ((3, 3, 3, channels, 4), (5, 8, 6, channels), (5, 48))
    return partial(loss, impl), *(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def test_gradient_inside_while_loop(problem):
    loss, kernels, x, weights = problem

    def descend(gradient, steps):
        def step(_, k):
            return k - 0.01 * gradient(k, x, weights)

        return lax.fori_loop(0, steps, step, jnp.asarray(kernels[0]))

    actual = jax.jit(partial(descend, jax.grad(loss)))(4)  # a traced count: `while`, not `scan`
    expected = jnp.asarray(kernels[0])
    for _ in range(4):
        expected -= 0.01 * jax.grad(plain_loss)(expected, x, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["vmap", "map"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_populations(problem, transform, dtype):
    loss, kernels, x, weights = problem
    gradient = jax.grad(lambda k, loss=loss: loss(k, x.astype(dtype), weights.astype(dtype)).astype(float))
    each = jax.vmap(gradient) if transform == "vmap" else partial(lax.map, gradient)
    expected = np.stack([gradient(k, plain_loss) for k in kernels])
    error = np.linalg.norm(jax.jit(each)(kernels) - expected)
    assert error < (1e-5 if dtype == jnp.float32 else 3e-2) * np.linalg.norm(expected)


def test_gradient_inside_shard_map(problem):
    loss, (kernel, *_), x, weights = problem
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P("batch"), P("batch")), "out_specs": P()}

    def gradient(kernel, x, weights):
        return lax.psum(jax.grad(loss)(kernel, x, weights), "batch")

    actual = jax.jit(jax.shard_map(gradient, mesh=mesh, check_vma=False, **specs))(kernel, x, weights)
    np.testing.assert_allclose(actual, jax.grad(plain_loss)(kernel, x, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_gradients_are_right_or_refused(problem, dtype):
    loss, (kernel, *_), x, weights = problem

    def twice(loss):
        def size(k):
            return (jax.grad(lambda k: loss(k, x.astype(dtype), weights).astype(jnp.float32) ** 2)(k) ** 2).sum()

        return jax.jit(jax.grad(size))(kernel)

    if dtype == jnp.bfloat16 and loss.args == ("matmul",):  # moved as integers, which have none: it would be 0
        with pytest.raises(TypeError, match=r"set config.model.conv=lax"):
            twice(loss)
        return
    expected = twice(plain_loss)
    assert np.linalg.norm(twice(loss) - expected) < (1e-4 if dtype == jnp.float32 else 0.1) * np.linalg.norm(expected)


@pytest.mark.parametrize("impl", ["matmul", "mixed", "lax"])
def test_gradients_of_biases_are_summed_in_float32(impl):
    x, kernel = jnp.ones((128, 14, 14, 2), jnp.bfloat16), jnp.zeros((3, 3, 2, 4))
    options = {"padding": "SAME", "pool_size": 2, "impl": impl}

    def loss(bias):
        y = conv.conv_bias_relu_pool(conv.to_internal(x, impl), kernel, bias, **options)
        return y.astype(jnp.float32).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(4)), 128 * 7 * 7)
