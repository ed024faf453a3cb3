"""Convolution and pooling as matrix products, for CPUs, beside plain `lax` convolution, for the rest.

XLA's CPU backend runs convolutions inside compiled loops, their gradients and the gradient of `reduce_window`
slowly, and matrix products at full speed. So the implementation "matmul" keeps activations *batch-minor*,
[channels, height, width, batch], where padding, patches and pooling copy long contiguous rows, and
multiplies. The implementation "lax" keeps [batch, height, width, channels]. Parameters are the same for both:
float32 kernels [height, width, in, out], and features [height, width, channels] after `flatten`.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Implementation = Literal["matmul", "lax"]
Activations = Float[Array, "..."]  # in the layout of an implementation: see `to_internal`
Images = Float[Array, "batch height width channels"]
CHANNEL_AXIS: dict[str, int] = {"matmul": 0, "lax": 3}


def default_impl(backend: str) -> Implementation:
    """The faster implementation on a JAX backend ("cpu", "gpu", "tpu")."""
    return "matmul" if backend == "cpu" else "lax"


def to_internal(images: Images, impl: Implementation) -> Activations:
    """Images in the layout that `impl` computes in: [channels, height, width, batch] for "matmul"."""
    return images.transpose(3, 1, 2, 0) if impl == "matmul" else images


def from_internal(x: Activations, impl: Implementation) -> Images:
    """The inverse of `to_internal`."""
    return x.transpose(3, 1, 2, 0) if impl == "matmul" else x


def flatten(x: Activations, impl: Implementation) -> Float[Array, "batch features"]:
    """Activations as one row an example, features in [height, width, channels] order."""
    x = from_internal(x, impl)
    return x.reshape(x.shape[0], -1)


def per_channel(values: Float[Array, " channels"], impl: Implementation) -> Activations:
    """A vector over channels, shaped to broadcast against activations."""
    return values.reshape(-1, 1, 1, 1) if impl == "matmul" else values


def conv(
    x: Activations,
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    *,
    stride: int,
    padding: str,
    impl: Implementation,
) -> Activations:
    """2-D convolution (cross-correlation, as everywhere in deep learning) without bias.

    `padding` is "SAME" or "VALID" with the meaning of `lax.conv_general_dilated`. Computes in the type of `x`
    (bfloat16 products accumulate in float32) and returns it.
    """
    if impl == "lax":
        return lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return _matmul_conv(stride, padding, x, kernel)


def pool(x: Activations, size: int, kind: str) -> Activations:
    """Pools windows of `size` x `size` that do not overlap;
    rows and columns beyond the last whole window are left out.

    `kind` is "max" or "avg". The gradient of a maximum goes to the first of equal values, as in `lax`.
    """
    if size == 1:
        return x
    height, width = x.shape[1] // size, x.shape[2] // size  # in either layout
    x = x[:, : height * size, : width * size]
    windows = x.reshape(x.shape[0], height, size, width, size, x.shape[3])
    return windows.mean((2, 4)) if kind == "avg" else _max_of_windows(windows)


def conv_bias_relu_pool(
    x: Activations,
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    bias: Float[Array, " out_channels"],
    *,
    stride: int,
    padding: str,
    pool_size: int,
    pooling: str,
    impl: Implementation,
) -> Activations:
    """`pool(relu(conv(x, kernel) + bias))`, a whole layer, in the order that is fastest."""
    y = conv(x, kernel, stride=stride, padding=padding, impl=impl)
    if (
        pooling == "max"
    ):  # adding a constant and relu are monotonic: the maximum may come first, and they are cheaper
        return jax.nn.relu(pool(y, pool_size, pooling) + per_channel(bias, impl).astype(y.dtype))
    return pool(jax.nn.relu(y + per_channel(bias, impl).astype(y.dtype)), pool_size, pooling)


@jax.custom_vjp
def _max_of_windows(windows: Float[Array, "a height size width size b"]) -> Float[Array, "a height width b"]:
    return windows.max((2, 4))


def _max_of_windows_fwd(windows):
    largest = windows.max((2, 4))
    return largest, (windows, largest)


def _max_of_windows_bwd(residuals, gradient):
    windows, largest = residuals
    size = windows.shape[2]
    taken = jnp.zeros(largest.shape, bool)
    rows = []
    for i in range(size):
        row = []
        for j in range(size):
            hit = (windows[:, :, i, :, j] == largest) & ~taken
            row.append(jnp.where(hit, gradient, 0))
            taken |= hit
        rows.append(jnp.stack(row, 3))
    return (jnp.stack(rows, 2),)


_max_of_windows.defvjp(_max_of_windows_fwd, _max_of_windows_bwd)


def _patches(
    size: tuple[int, int], stride: int, padding: str, x: Float[Array, "channels height width batch"]
) -> Float[Array, "taps out_height out_width batch"]:
    """What each output sees: one row a kernel tap, ordered as a flattened kernel."""
    (top, bottom), (left, right) = lax.padtype_to_pads(x.shape[1:3], size, (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], size, strict=True))
    return jnp.concatenate(
        [
            x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            for i in range(size[0])
            for j in range(size[1])
        ]
    )


def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """a b, accumulated and returned in float32 at least: the form [m,k] x [k,n] is what matrix units run."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_conv(stride, padding, x, kernel):
    return _matmul_conv_fwd(stride, padding, x, kernel)[0]


def _matmul_conv_fwd(stride, padding, x, kernel):
    patches = _patches(kernel.shape[:2], stride, padding, x)
    columns = patches.reshape(patches.shape[0], -1)
    y = _product(kernel.reshape(-1, kernel.shape[3]).T.astype(x.dtype), columns)
    return y.astype(x.dtype).reshape(-1, *patches.shape[1:]), (x, kernel)


def _matmul_conv_bwd(stride, padding, residuals, gradient):
    x, kernel = residuals
    patches, fold = jax.vjp(partial(_patches, kernel.shape[:2], stride, padding), x)
    columns = patches.reshape(patches.shape[0], -1)
    gradient = gradient.reshape(gradient.shape[0], -1)
    d_kernel = _product(columns, gradient.T).reshape(kernel.shape).astype(kernel.dtype)
    d_columns = _product(kernel.reshape(-1, kernel.shape[3]).astype(x.dtype), gradient)
    return *fold(d_columns.astype(x.dtype).reshape(patches.shape)), d_kernel


_matmul_conv.defvjp(_matmul_conv_fwd, _matmul_conv_bwd)
