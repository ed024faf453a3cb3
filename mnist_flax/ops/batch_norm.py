"""Batch norm (Ioffe and Szegedy 2015) in training, with its gradient derived by hand, for CPUs.

Over the n numbers of a channel, in the whole batch on all devices, let x' = (x - mean) / sqrt(variance + epsilon), and
y = scale x' + bias. With d the gradient of y, the gradient of bias is the sum of d, that of scale the sum of d x', and
since mean and variance depend on every x, and so does the loss through them,

    d_x = scale / sqrt(variance + epsilon) (d - mean(d) - x' mean(d x')).

That is two passes over the activations each way, the first of them for both sums.

Activations are batch-minor, [channels, height, width, batch].
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mnist_flax.ops.xla_cpu import as_bits, as_numbers, materialize, widened

BatchMinor = Float[Array, "channels height width batch"]
Channels = Float[Array, " channels"]


def _sums(function: Callable[..., Sequence[Array]], *arrays: BatchMinor) -> Float[Array, "numbers channels"]:
    """The sums, by channel, of each of the numbers that `function` makes of those in arrays of one shape.

    Rows are added to each other first: XLA hands sums to a library that wants all its operands copied to float32.
    """

    def added_rows(*arrays):
        rows = [function(*(array[:, i, :, None] for array in arrays)) for i in range(arrays[0].shape[1])]
        return sum(jnp.concatenate(numbers, 2) for numbers in rows)  # side by side: in the cache since the first one

    return materialize(added_rows, *arrays).sum((1, 3)).T


def _mean_over_devices(values: Array, batch_axis: str | None) -> Array:
    return values if batch_axis is None else lax.pmean(values, batch_axis)


def _per_channel(values: Channels) -> Array:
    return values.reshape(-1, 1, 1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def batch_norm(
    epsilon: float, batch_axis: str | None, x: BatchMinor, scale: Channels, bias: Channels
) -> tuple[BatchMinor, Channels, Channels]:
    """y in the type of `x`, and the batch's mean and variance, whose gradients are left out: see `conv.batch_norm`."""
    return _batch_norm_fwd(epsilon, batch_axis, x, scale, bias)[0]


def _batch_norm_fwd(epsilon, batch_axis, x, scale, bias):
    bits, count = as_bits(x), x.size // x.shape[0]
    sums = _sums(lambda x: (widened(x), widened(x) ** 2), bits)
    mean, square = _mean_over_devices(sums / count, batch_axis)
    variance = jnp.maximum(square - mean**2, 0)
    factor = lax.rsqrt(variance + epsilon)
    y = (widened(bits) - _per_channel(mean)) * _per_channel(scale * factor) + _per_channel(bias)
    return (y.astype(x.dtype), mean, variance), (x, scale, mean, factor)


def _batch_norm_bwd(epsilon, batch_axis, residuals, gradients):
    x, scale, mean, factor = residuals
    bits, d, count = as_bits(x), as_bits(gradients[0]), x.size // x.shape[0]

    def normalised(x):
        return (widened(x) - _per_channel(mean)) * _per_channel(factor)

    d_bias, d_scale = sums = _sums(lambda d, x: (widened(d), widened(d) * normalised(x)), d, bits)
    mean_d, mean_dx = _mean_over_devices(sums / count, batch_axis)

    def to_x(d, x):
        d_x = widened(d) - _per_channel(mean_d) - normalised(x) * _per_channel(mean_dx)
        return as_bits((d_x * _per_channel(scale * factor)).astype(gradients[0].dtype))

    return as_numbers(materialize(to_x, d, bits), x.dtype), d_scale, d_bias


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)
