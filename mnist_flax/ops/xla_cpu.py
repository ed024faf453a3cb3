"""How to write what XLA's CPU backend should run: 16-bit numbers as integers, and arrays that are really made.

XLA moves bfloat16 through float32, so what is only moved is moved as 16-bit integers. And it folds an operation into
all that use it, a transpose or reshape into a product or a loop that then divides indices for every number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def as_bits(x: Array) -> Array:
    """16-bit numbers as integers, to be moved; others as they are.

    Only in functions that have a gradient of their own. Raises TypeError where JAX would differentiate it, as in the
    gradient of a gradient: through integers that would be 0.
    """
    return _bits(x) if x.dtype.itemsize == 2 else x


@jax.custom_jvp
def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16)


@_bits.defjvp
def _bits_jvp(primals, tangents):
    raise TypeError(
        "matrix products in bfloat16 have no gradients of gradients on CPU: "
        "set config.model.conv=lax, or config.model.compute_dtype=float32"
    )


def as_numbers(bits: Array, dtype: Any) -> Array:
    """The inverse of `as_bits`."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


def widened(bits: Array) -> Float[Array, "..."]:
    """`as_bits` of bfloat16 as the same numbers in float32, whose upper half they are; others as they are."""
    if bits.dtype != jnp.uint16:
        return bits
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def materialize(function: Callable[..., Array], *operands: Array) -> Array:
    """`function(*operands)` as an array of its own, never computed again or folded into what uses it.

    XLA neither moves operations out of a branch nor knows that this one is always taken (half an integer is
    more than the smallest integer). Fused with a reshape, a loop divides indices for every number; here it does not.
    """
    first = operands[0]
    integer = jnp.int16 if first.dtype.itemsize == 2 else jnp.int32
    always = lax.bitcast_convert_type(first[(0,) * first.ndim], integer).ravel()[0] >> 1 > jnp.iinfo(integer).min
    result = jax.eval_shape(function, *operands)
    return lax.cond(always, function, lambda *_: jnp.zeros_like(first, result.dtype, result.shape), *operands)
