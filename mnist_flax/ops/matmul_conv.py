"""Convolutions with pooling, and dense layers, as matrix products with gradients derived by hand, for CPUs.

What `conv.py` calls "matmul". Activations are batch-minor, [channels, height, width, batch].

Let k be the kernel's size and p the side of the pooling windows.

*Patches.* Column n of a matrix C holds the input values that output n sees, so Y = W^T C is the convolution,
for W = kernel as [k k in, out]. Its gradients are products too: dW = C dY^T, and dC = W dY, whose entries are
then added up where they came from.

*Fused windows.* One patch of P = k + p - 1 rows and columns holds all that a pooling window needs. With
the kernel copied into a zero array of that size at each of the p p places, W is [P P in, p p out] and one
product gives all the elements of each window, [p p, out, window], where their maximum is elementwise. That
takes (P / k)^2 as many multiplications and moves less: it pays for one input channel. Otherwise patches are
ordinary, and windows are read from the outputs.

*Steps.* Fused, patches follow each other by a step of p. Rows and columns are sorted by their residue modulo
that step once, after which every patch is made of contiguous pieces, and neighbours are one element apart.

*Tiles.* Patches are many times larger than the images. They are made for a few rows (and examples) at a time,
in a loop, so that what is written, multiplied and read back stays within the processor's cache.

*Memory.* The backward pass keeps the input and, for a maximum, one byte an output: which element of its
window was the largest, or p p where relu stopped it. Patches are made again.

*bfloat16* runs on the processor's bfloat16 units only as a b or a b^T of row-major operands accumulated in
float32. XLA folds transposes into products, which makes other forms; `materialize` prevents that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from mnist_flax.ops.pooling import into_windows, largest_of, window_elements
from mnist_flax.ops.xla_cpu import as_bits, as_numbers, materialize

Matrix = Float[Array, "in out"]
Kernel = Float[Array, "kernel_height kernel_width in_channels out_channels"]
BatchMinor = Float[Array, "channels height width batch"]


# Products


def _fast(a: Float[Array, "m n"], dtype: Any = None) -> Float[Array, "m n"]:
    """An operand or (as `dtype`) a result of `_product`, in bfloat16 as a row-major array of its own."""
    dtype = dtype or a.dtype
    if dtype != jnp.bfloat16:
        return a.astype(dtype)
    return materialize(lambda a: as_numbers(as_bits(a.astype(dtype)).reshape(-1), dtype), a).reshape(a.shape)


def _fast_transposed(a: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """The transpose of an operand, likewise: a branch that returns a vector has no choice of its layout."""
    if a.dtype != jnp.bfloat16:
        return a.T
    return materialize(lambda a: as_numbers(as_bits(a).T.reshape(-1), a.dtype), a).reshape(a.shape[::-1])


def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """a b, accumulated and returned in float32 at least."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _product_with_transposed(a: Float[Array, "m k"], b: Float[Array, "n k"]) -> Float[Array, "m n"]:
    """a b^T, likewise; b is transposed while it is packed for the product, so that it should be the smaller one."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=wide)


@jax.custom_vjp
def dense(x: Float[Array, "batch in"], kernel: Matrix) -> Float[Array, "batch out"]:
    """`x @ kernel`, of which x or the kernel is transposed, the smaller one: what convolutions leave is batch-minor.

    With a batch-minor d_y too, its gradients, kernel d_y^T and x^T d_y, need no transpose.
    """
    if len(x) < kernel.shape[1]:
        return _product(_fast_transposed(x.T), kernel).astype(x.dtype)
    return _fast(_product(_fast_transposed(kernel), _fast(x.T)), x.dtype).T


def _dense_fwd(x, kernel):
    return dense(x, kernel), (x, kernel)


def _dense_bwd(residuals, gradient):
    x, kernel = residuals
    gradient = _fast(gradient.T)
    d_x = _fast(_product(kernel, gradient), x.dtype).T
    return d_x, _product_with_transposed(_fast(x.T), gradient).astype(kernel.dtype)


dense.defvjp(_dense_fwd, _dense_bwd)


# Convolutions as products: geometry


class Layer(NamedTuple):
    padding: str
    pool_size: int | None  # None: a convolution alone; otherwise bias, relu and maximum over windows follow


class _Plan(NamedTuple):
    """What is known before any number is; pairs are (height, width)."""

    pool_size: int
    side: int  # of the outputs that come from one patch, and the step to the next: p when windows are fused, else 1
    patch: tuple[int, ...]  # rows and columns of a patch
    patches: tuple[int, ...]  # how many there are
    pads: tuple[tuple[int, int], ...]  # before and after; negative ones crop
    tile: tuple[int, int]  # rows of patches, and examples

    def shifts(self, axis: int) -> list[tuple[int, int]]:
        """The steps that a patch spans, each with the number of its rows (or columns) in the patch."""
        size = self.patch[axis]
        return [(d, min(self.side, size - d * self.side)) for d in range(-(-size // self.side))]

    def pieces(self) -> list[tuple[int, int, int, int]]:
        """(shift, rows, shift, columns) of each contiguous piece of a patch, in order."""
        return [(i, a, j, b) for i, a in self.shifts(0) for j, b in self.shifts(1)]


TILE_BYTES = 8 * 2**20  # of patches and outputs: more starves a core's cache, less is all overhead


def _largest_divisor(n: int, limit: int) -> int:
    return max((d for d in range(1, n + 1) if n % d == 0 and d <= max(limit, 1)), default=1)


def _plan(layer: Layer, shape: tuple[int, ...], dtype: Any, kernel_shape: tuple[int, ...]) -> _Plan:
    *size, channels, features = kernel_shape
    pool_size, itemsize = layer.pool_size or 1, jnp.dtype(dtype).itemsize
    pads = lax.padtype_to_pads(shape[1:3], size, (1, 1), layer.padding)
    outputs = [n + sum(pad) - k + 1 for n, k, pad in zip(shape[1:3], size, pads, strict=True)]
    side = pool_size if channels == 1 else 1
    patch = [k + side - 1 for k in size]
    count = [n // pool_size * pool_size // side for n in outputs]
    padded = [(n + -(-p // side) - 1) * side for n, p in zip(count, patch, strict=True)]
    pads = [(before, m - n - before) for n, m, (before, _) in zip(shape[1:3], padded, pads, strict=True)]
    # A tile holds whole windows, so rows of patches come in groups of the rows that one row of windows needs.
    group = pool_size // side
    column_bytes = patch[0] * patch[1] * channels * itemsize + side**2 * features * 4
    budget = TILE_BYTES // (group * count[1] * column_bytes)
    examples = _largest_divisor(shape[3], budget)
    rows = _largest_divisor(count[0] // group, budget // examples) * group
    return _Plan(pool_size, side, tuple(patch), tuple(count), tuple(pads), (rows, examples))


def _sort(plan: _Plan, x: BatchMinor) -> Float[Array, "side side channels h w batch"]:
    """The padded input, rows and columns sorted by their residue modulo the side."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in plan.pads), (0, 0, 0)])
    channels, height, width, batch = x.shape
    x = x.reshape(channels, height // plan.side, plan.side, width // plan.side, plan.side, batch)
    return x.transpose(2, 4, 0, 1, 3, 5)


def _patches(plan: _Plan, x: Float[Array, "side side channels h w batch"]) -> list[BatchMinor]:
    """The pieces that make up the patches of sorted rows, to be stacked along the first axis."""
    height, width = x.shape[3] - len(plan.shifts(0)) + 1, plan.patches[1]
    pieces = [x[:a, :b, :, i : i + height, j : j + width] for i, a, j, b in plan.pieces()]
    return [piece.reshape(-1, height, width, x.shape[5]) for piece in pieces]


def in_windows(kernel: Kernel, side: int) -> Float[Array, "P P in side_side out"]:
    """The kernel, copied into zeros to each of the places that it has in a window of `side` x `side` outputs."""
    pads = [(i, side - 1 - i) for i in range(side)]
    copies = [jnp.pad(kernel, (rows, columns, (0, 0), (0, 0))) for rows in pads for columns in pads]
    return jnp.stack(copies, 3)


def _kernel_matrix(plan: _Plan, kernel: Kernel) -> Float[Array, "taps outputs"]:
    """W: rows in the order of `_patches`, columns [side, side, out]."""
    copies, outputs = in_windows(kernel, plan.side), plan.side**2 * kernel.shape[3]
    starts = [(i * plan.side, a, j * plan.side, b) for i, a, j, b in plan.pieces()]
    return jnp.concatenate([copies[i : i + a, j : j + b].reshape(-1, outputs) for i, a, j, b in starts])


# Convolutions as products: tiles


def _over_tiles(plan: _Plan, batch: int, body: Callable, carry: Any) -> Any:
    """Folds `body((row, example), carry)` over the tiles; they start at that row of patches and example."""
    rows, examples = plan.tile
    across = batch // examples
    if plan.patches[0] == rows and across == 1:
        return body((0, 0), carry)
    count = plan.patches[0] // rows * across
    return lax.fori_loop(0, count, lambda i, c: body((i // across * rows, i % across * examples), c), carry)


def _read(array: Array, start: tuple[Any, Any], size: tuple[int, int]) -> Array:
    """Rows and examples (axes -3 and -1) from `start`."""
    rest = array.ndim - 3
    starts = (*[0] * rest, start[0], 0, start[1])
    return lax.dynamic_slice(array, starts, (*array.shape[:rest], size[0], array.shape[-2], size[1]))


def _write(array: Array, tile: Array, start: tuple[Any, Any]) -> Array:
    starts = (*[0] * (array.ndim - 3), start[0], 0, start[1])
    return lax.dynamic_update_slice(array, tile.astype(array.dtype), starts)


def _columns(plan: _Plan, x: Array, start: tuple[Any, Any], dtype: Any) -> BatchMinor:
    """The patches of one tile, [taps, rows, width, examples], in the order of `_patches`.

    One pass gathers them; written piece by piece, as integers, all would be copied once more to become numbers.
    """
    channels, (rows, examples) = x.shape[2], plan.tile
    taps = np.array([(a, b, i, j) for i, A, j, B in plan.pieces() for a in range(A) for b in range(B)], np.int32)
    corners = jnp.concatenate([taps + jnp.array([0, 0, 1, 0]) * start[0], jnp.full((len(taps), 1), start[1])], 1)
    sizes = (1, 1, channels, rows, plan.patches[1], examples)
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(1, 2, 3, 4), collapsed_slice_dims=(0, 1), start_index_map=(0, 1, 3, 4, 5)
    )

    def gathered(x, corners):
        return as_numbers(lax.gather(x, corners, dimensions, sizes, mode="promise_in_bounds"), dtype)

    return materialize(gathered, x, corners).reshape(-1, *sizes[3:])


def _pooled(plan: _Plan, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """(rows of patches, examples) as (rows of outputs, examples)."""
    return pair[0] * plan.side // plan.pool_size, pair[1]


def _tile_gradient(
    plan: _Plan, start: tuple[Any, Any], gradient: BatchMinor, index: UInt8[Array, "..."] | None = None
) -> Array:
    """Gradient of what a tile's product gave, [side^2, features, rows, width, examples], from that of the output.

    The output is that of the product, or with an `index` its maxima over windows.
    """
    place = _pooled(plan, start), _pooled(plan, plan.tile)
    gradient = _read(gradient, *place)
    if index is None:
        return gradient
    index = _read(index, *place)
    if plan.side == 1:
        return into_windows(gradient, index, plan.pool_size)
    element = jnp.arange(plan.side**2, dtype=index.dtype).reshape(-1, 1, 1, 1, 1)
    return jnp.where(index == element, gradient, 0)


# Convolutions as products: forward and backward


def _forward(layer: Layer, x: BatchMinor, kernel: Kernel, bias: Array | None, with_index: bool):
    plan = _plan(layer, x.shape, x.dtype, kernel.shape)
    features, batch = kernel.shape[3], x.shape[3]
    matrix = _kernel_matrix(plan, kernel).astype(x.dtype)
    matrix = _fast_transposed(matrix)
    rows = _sort(plan, as_bits(x))

    def body(start, carry):
        out, index = carry
        columns = _columns(plan, rows, start, x.dtype)
        y = _product(matrix, columns.reshape(columns.shape[0], -1))
        y = y.reshape(plan.side**2, features, *columns.shape[1:])
        if bias is None:
            largest = y[0]
        else:
            elements = list(y) if plan.side > 1 else window_elements(y[0], plan.pool_size)
            largest, which = largest_of(elements)
            largest += bias.astype(y.dtype)[:, None, None, None]
            if index is not None:
                which = jnp.where(largest > 0, which, plan.pool_size**2)
                index = _write(index, which, _pooled(plan, start))
            largest = jnp.maximum(largest, 0)
        return _write(out, as_bits(largest.astype(x.dtype)), _pooled(plan, start)), index

    shape = (features, *(n * plan.side // plan.pool_size for n in plan.patches), batch)
    if not batch:
        return jnp.zeros_like(x, shape=shape), None
    index = jnp.zeros_like(x, jnp.uint8, shape) if with_index else None
    out, index = _over_tiles(plan, batch, body, (jnp.zeros_like(rows, shape=shape), index))
    return as_numbers(out, x.dtype), index


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolution(layer: Layer, x: BatchMinor, kernel: Kernel, bias: Float[Array, " out"] | None) -> BatchMinor:
    """The convolution of `layer`, and with a bias also relu and the maxima over its windows, in the type of `x`."""
    return _forward(layer, x, kernel, bias, with_index=False)[0]


def _convolution_fwd(layer, x, kernel, bias):
    out, index = _forward(layer, x, kernel, bias, with_index=bias is not None)
    return out, (x, index, kernel, bias)


def _convolution_bwd(layer, residuals, gradient):
    x, index, kernel, bias = residuals
    plan = _plan(layer, x.shape, x.dtype, kernel.shape)
    to_matrix = partial(_kernel_matrix, plan)
    matrix = to_matrix(kernel).astype(x.dtype)
    rows = _sort(plan, as_bits(x))
    taps, outputs = matrix.shape
    swap = taps < outputs  # dW^T = dY C^T, so that the smaller one is transposed
    d_output = [as_bits(gradient)] if index is None else [as_bits(gradient), index]

    def body(start, carry):
        d_matrix, d_rows = carry
        columns = _columns(plan, rows, start, x.dtype)
        d_y = as_numbers(materialize(partial(_tile_gradient, plan, start), *d_output), x.dtype).reshape(outputs, -1)
        c = columns.reshape(taps, -1)
        d_matrix += _product_with_transposed(*((d_y, c) if swap else (c, d_y)))
        d_columns = _product(matrix, d_y).reshape(columns.shape)
        before = _read(d_rows, start, (columns.shape[1] + len(plan.shifts(0)) - 1, columns.shape[3]))
        _, add_up = jax.vjp(lambda x: jnp.concatenate(_patches(plan, x)), before)
        return d_matrix, _write(d_rows, before + add_up(d_columns)[0], start)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    d_matrix = jnp.zeros_like(gradient, wide, (outputs, taps) if swap else (taps, outputs))
    d_matrix, d_rows = _over_tiles(plan, gradient.shape[3], body, (d_matrix, jnp.zeros_like(rows, wide)))
    d_matrix = d_matrix.T if swap else d_matrix
    (d_kernel,) = jax.linear_transpose(to_matrix, kernel)(d_matrix.astype(kernel.dtype))
    (d_x,) = jax.linear_transpose(partial(_sort, plan), x.astype(wide))(d_rows)
    d_bias = None
    if bias is not None:
        d_bias = jnp.where(index < plan.pool_size**2, gradient, 0).sum((1, 2, 3), bias.dtype)
    return d_x.astype(x.dtype), d_kernel, d_bias


convolution.defvjp(_convolution_fwd, _convolution_bwd)
