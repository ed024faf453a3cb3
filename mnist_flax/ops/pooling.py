"""Maxima over windows, and their gradients: one byte a window says which element was the largest."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from mnist_flax.ops.xla_cpu import as_bits, as_numbers, materialize, widened

Activations = Float[Array, "a height width b"]  # any layout that has rows and columns in the middle


def largest_of(candidates: list[Array]) -> tuple[Array, UInt8[Array, "..."]]:
    """Elementwise maximum of arrays of one shape, and the index of the first array that has it."""
    largest, index = candidates[0], jnp.zeros_like(candidates[0], jnp.uint8)
    for i, candidate in enumerate(candidates[1:], 1):
        index = jnp.where(candidate > largest, jnp.uint8(i), index)
        largest = jnp.maximum(largest, candidate)
    return largest, index


def window_elements(x: Activations, size: int) -> list[Array]:
    """Element (i, j) of every window of `size` x `size`, for all (i, j) in row order."""
    height, width = x.shape[1] // size, x.shape[2] // size
    windows = x.reshape(x.shape[0], height, size, width, size, x.shape[3])
    return [windows[:, :, i, :, j] for i in range(size) for j in range(size)]


def into_windows(values: Activations, index: Array, size: int) -> Activations:
    """The transpose of a maximum over windows: each value at the element that `index` names, 0 elsewhere."""
    a, height, width, b = values.shape
    element = jnp.arange(size * size, dtype=index.dtype).reshape(size, 1, size, 1)
    windows = jnp.where(index[:, :, None, :, None] == element, values[:, :, None, :, None], 0)
    return windows.reshape(a, height * size, width * size, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def max_pool(size: int, x: Activations) -> Activations:
    """Maxima over windows of `size` x `size` that fill `x`; the first of equal ones has the gradient."""
    return reduce(jnp.maximum, window_elements(x, size))


def _max_pool_fwd(size, x):
    return largest_of(window_elements(x, size))


def _max_pool_bwd(size, index, gradient):
    return (into_windows(gradient, index, size),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def relu_max_pool(size: int, x: Activations) -> Activations:
    """`max_pool(size, relu(x))`, for CPUs: it keeps a byte a window, `size` x `size` where relu stopped it."""
    return _relu_max_pool_fwd(size, x)[0]


def _relu_max_pool_fwd(size, x):
    largest, index = largest_of([widened(element) for element in window_elements(as_bits(x), size)])
    index = jnp.where(largest > 0, index, jnp.uint8(size * size))
    return jnp.maximum(largest, 0).astype(x.dtype), index


def _relu_max_pool_bwd(size, index, gradient):
    d_x = materialize(lambda gradient, index: into_windows(gradient, index, size), as_bits(gradient), index)
    return (as_numbers(d_x, gradient.dtype),)


relu_max_pool.defvjp(_relu_max_pool_fwd, _relu_max_pool_bwd)
