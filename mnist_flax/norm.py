"""Batch norm (Ioffe and Szegedy 2015) in training, with its gradient derived by hand, for CPUs.

Over the n numbers of a channel, in the whole batch on all devices, let x' = (x - mean) / sqrt(variance + epsilon), and
y = scale x' + bias. With d the gradient of y, the gradient of bias is the sum of d, that of scale the sum of d x', and
since mean and variance depend on every x, and so does the loss through them,

    d_x = scale / sqrt(variance + epsilon) (d - mean(d) - x' mean(d x')).

That is three passes over the activations each way, two of them for sums. There rows are added to each other first, in a
loop of its own: XLA hands sums to a library that wants all its operands copied to float32.

Activations are batch-minor, [channels, height, width, batch].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mnist_flax.xla_cpu import apart, as_bits, as_numbers, widened

BatchMinor = Float[Array, "channels height width batch"]
Channels = Float[Array, " channels"]


def _sum(function: Callable, *arrays: Array) -> Channels:
    """The sum of `function` of the numbers in arrays of one shape, by channel."""

    def added_rows(*arrays):
        return sum(function(*(array[:, i] for array in arrays)) for i in range(arrays[0].shape[1]))

    return apart(added_rows, *arrays).sum((1, 2))


def _mean_over_devices(values: Any, batch_axis: str | None) -> Any:
    return values if batch_axis is None else lax.pmean(values, batch_axis)


def _per_channel(values: Channels, dimensions: int) -> Array:
    return values.reshape(-1, *[1] * (dimensions - 1))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def batch_norm(
    epsilon: float, batch_axis: str | None, x: BatchMinor, scale: Channels, bias: Channels
) -> tuple[BatchMinor, Channels, Channels]:
    """y in the type of `x`, and the batch's mean and variance, whose gradients are left out: see `conv.batch_norm`."""
    return _batch_norm_fwd(epsilon, batch_axis, x, scale, bias)[0]


def _batch_norm_fwd(epsilon, batch_axis, x, scale, bias):
    bits, count = as_bits(x), x.size // x.shape[0]
    sums = _sum(widened, bits), _sum(lambda x: widened(x) ** 2, bits)
    mean, square = _mean_over_devices(jax.tree.map(lambda s: s / count, sums), batch_axis)
    variance = jnp.maximum(square - mean**2, 0)
    factor = lax.rsqrt(variance + epsilon)
    y = (widened(bits) - _per_channel(mean, 4)) * _per_channel(scale * factor, 4) + _per_channel(bias, 4)
    return (y.astype(x.dtype), mean, variance), (x, scale, mean, factor)


def _batch_norm_bwd(epsilon, batch_axis, residuals, gradients):
    x, scale, mean, factor = residuals
    bits, d, count = as_bits(x), as_bits(gradients[0]), x.size // x.shape[0]

    def centred(x):
        return widened(x) - _per_channel(mean, x.ndim)

    d_bias = _sum(widened, d)
    d_scale = _sum(lambda d, x: widened(d) * centred(x), d, bits) * factor
    mean_d, mean_dx = _mean_over_devices((d_bias / count, d_scale / count), batch_axis)

    def to_x(d, x):
        d_x = widened(d) - _per_channel(mean_d, 4) - centred(x) * _per_channel(factor * mean_dx, 4)
        return as_bits((d_x * _per_channel(scale * factor, 4)).astype(gradients[0].dtype))

    return as_numbers(apart(to_x, d, bits), x.dtype), d_scale, d_bias


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
