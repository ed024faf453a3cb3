"""Convolution and pooling as matrix products, for CPUs and in part for GPUs, beside plain `lax` convolution.

XLA's CPU backend runs convolutions in compiled loops, their gradients and the gradient of `reduce_window` slowly, and
matrix products at full speed. So the implementation "matmul" keeps activations *batch-minor*, [channels, height, width,
batch], where padding, patches and pooling copy long contiguous rows, and multiplies (`matmul_conv.py`); batch norm and
maxima have gradients of their own (`batch_norm.py`, `pooling.py`). The implementations "lax" and "mixed" keep [batch,
height, width, channels]; on GPUs cuDNN's convolutions are fast but for images of one channel, which "mixed" multiplies
instead (`first_layer_conv.py`). In all, axes 1 and 2 are height and width. Parameters are the same for all, float32
kernels [height, width, in, out] and features in order [height, width, channels] after `flatten`: a model trained with
one can be used with another.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mnist_flax.ops import batch_norm as batch_norm_lib
from mnist_flax.ops import first_layer_conv, matmul_conv
from mnist_flax.ops.batch_norm import Channels
from mnist_flax.ops.matmul_conv import Kernel, Layer, Matrix
from mnist_flax.ops.pooling import max_pool, relu_max_pool

Implementation = Literal["matmul", "mixed", "lax"]
Images = Float[Array, "batch height width channels"]
Activations = Float[Array, "..."]  # in the layout of an implementation: see `to_internal`

CHANNEL_AXIS: dict[str, int] = {"matmul": 0, "mixed": 3, "lax": 3}


def default_impl(backend: str) -> Implementation:
    """The fastest implementation on a JAX backend ("cpu", "gpu", "tpu"), as far as it was measured."""
    defaults: dict[str, Implementation] = {"cpu": "matmul", "gpu": "mixed"}
    return defaults.get(backend, "lax")


def to_internal(images: Images, impl: Implementation) -> Activations:
    """Images in the layout that `impl` computes in: [channels, height, width, batch] for "matmul"."""
    return images.transpose(3, 1, 2, 0) if impl == "matmul" else images


def from_internal(x: Activations, impl: Implementation) -> Images:
    """The inverse of `to_internal`."""
    return x.transpose(3, 1, 2, 0) if impl == "matmul" else x


def flatten(x: Activations, impl: Implementation) -> Float[Array, "batch features"]:
    """Activations as one row an example, features in [height, width, channels] order."""
    if impl == "matmul":
        channels, height, width, batch = x.shape
        return x.transpose(1, 2, 0, 3).reshape(height * width * channels, batch).T  # batch-minor, as `dense` wants it
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def per_channel(values: Channels, impl: Implementation) -> Activations:
    """A vector over channels, shaped to broadcast against activations."""
    return values.reshape(-1, 1, 1, 1) if impl == "matmul" else values


def conv(x: Activations, kernel: Kernel, *, padding: str, impl: Implementation) -> Activations:
    """2-D convolution (cross-correlation, as everywhere in deep learning) without bias.

    `padding` is "SAME" or "VALID" with the meaning of `lax.conv_general_dilated`. Computes in the type of `x`
    (bfloat16 products accumulate in float32) and returns it.
    """
    if multiply := _as_product(kernel, impl):
        return multiply(Layer(padding, None), x, kernel, None)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel.astype(x.dtype), (1, 1), padding, dimension_numbers=numbers)


def _as_product(kernel: Kernel, impl: Implementation) -> Callable | None:
    """`matmul_conv.convolution`, or what is called alike, where `impl` makes this convolution a product."""
    if impl == "mixed":
        return first_layer_conv.convolution if kernel.shape[2] == 1 else None
    return matmul_conv.convolution if impl == "matmul" else None


def relu_pool(x: Activations, size: int, impl: Implementation) -> Activations:
    """Maxima of `relu(x)` over windows of `size` x `size` that do not overlap.

    What is beyond the last whole window is left out. The gradient goes to the first of equal maxima, as in `lax`.
    """
    height, width = x.shape[1] // size, x.shape[2] // size
    x = x[:, : height * size, : width * size]
    if impl == "matmul":
        return relu_max_pool(size, x)
    return jax.nn.relu(max_pool(size, x) if size > 1 else x)  # the same as maxima of relu, and cheaper


def batch_norm(
    x: Activations, scale: Channels, bias: Channels, epsilon: float, *, batch_axis: str | None, impl: Implementation
) -> tuple[Activations, Channels, Channels]:
    """Batch norm (Ioffe and Szegedy 2015) with the statistics of this batch; gives its mean and variance besides.

    They are over examples, height, width and the devices of `batch_axis`, in float32 at least; as results they have no
    gradient. The variance is the mean square less the squared mean, as in Flax. The normalised `x` has the type of `x`.
    """
    if impl == "matmul":
        y, *statistics = batch_norm_lib.batch_norm(epsilon, batch_axis, x, scale, bias)
        mean, variance = lax.stop_gradient(statistics)
        return y, mean, variance
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    means = wide.mean((0, 1, 2)), (wide**2).mean((0, 1, 2))
    mean, square = means if batch_axis is None else lax.pmean(means, batch_axis)
    variance = jnp.maximum(square - mean**2, 0)
    y = batch_norm_inference(x, mean, variance, scale, bias, epsilon, impl=impl)
    return y, *lax.stop_gradient((mean, variance))


def batch_norm_inference(
    x: Activations,
    mean: Channels,
    variance: Channels,
    scale: Channels,
    bias: Channels,
    epsilon: float,
    *,
    impl: Implementation,
) -> Activations:
    """`scale (x - mean) / sqrt(variance + epsilon) + bias` by channel, in the type of `x`."""
    mean, factor, bias = (per_channel(v, impl) for v in (mean, scale * lax.rsqrt(variance + epsilon), bias))
    return ((x - mean) * factor + bias).astype(x.dtype)


def conv_bias_relu_pool(
    x: Activations,
    kernel: Kernel,
    bias: Float[Array, " out_channels"],
    *,
    padding: str,
    pool_size: int,
    impl: Implementation,
) -> Activations:
    """`pool(relu(conv(x, kernel) + bias))`: a whole layer without normalisation, in its fastest form."""
    if multiply := _as_product(kernel, impl):
        return multiply(Layer(padding, pool_size), x, kernel, bias)
    y = conv(x, kernel, padding=padding, impl=impl)
    y = (y + per_channel(bias, impl)).astype(y.dtype)  # added in float32, so that the bias's gradient is summed in it
    return relu_pool(y, pool_size, impl)


def dense(
    x: Float[Array, "batch in"], kernel: Matrix, dimension_numbers: Any, *, impl: Implementation, **options: Any
) -> Float[Array, "batch out"]:
    """`x @ kernel`, called as `nn.Dense` calls `lax.dot_general`."""
    if impl == "matmul":
        return matmul_conv.dense(x, kernel)
    return lax.dot_general(x, kernel, dimension_numbers, **options)
