"""A layer on images of one channel as a product of matrices, for GPUs: the first one of what `conv.py` calls "mixed".

Libraries make convolutions for many channels; with one, most of what they multiply and move is padding. Here, as in
`matmul_conv.py` where windows are fused, one patch of P = k + p - 1 rows and columns holds all that a pooling window
needs, for a kernel of size k and windows of side p. Patches, each with a 1 behind it, are the rows of a matrix C. The
kernel, copied to each of the p p places, and below it the bias are the columns of W. So Y = C W holds the elements of
all windows, [batch, height, width, p p, out], where their maximum is elementwise. Its gradients are products too: dW =
C^T dY, the bias included, and dC = dY W^T, for those who ask for the gradient of the image.

The backward pass keeps C, (P / p)^2 times as large as the image, and one byte a maximum: which element it was, or
p p where relu stopped it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from mnist_flax.ops.matmul_conv import Kernel, Layer, in_windows
from mnist_flax.ops.pooling import largest_of

Images = Float[Array, "batch height width 1"]
Outputs = Float[Array, "batch height_out width_out out_channels"]

_ALIGNMENT = 8  # rows of W, in numbers: matrix units load 16 bytes


def _side(layer: Layer, kernel_size: int) -> int:
    """P, the rows and columns of a patch."""
    return kernel_size + (layer.pool_size or 1) - 1


def _patches(layer: Layer, kernel_size: int, x: Images) -> Float[Array, "batch height width taps"]:
    """The patch of every window, its P P numbers in row order."""
    side, pool_size = _side(layer, kernel_size), layer.pool_size or 1
    pads = lax.padtype_to_pads(x.shape[1:3], (kernel_size, kernel_size), (1, 1), layer.padding)
    outputs = [n + sum(pad) - kernel_size + 1 for n, pad in zip(x.shape[1:3], pads, strict=True)]
    rows, columns = (np.arange(n // pool_size)[:, None] * pool_size + np.arange(side) for n in outputs)
    patches = jnp.pad(x[..., 0], ((0, 0), *pads))[:, rows][..., columns]  # [batch, height, side, width, side]
    return patches.transpose(0, 1, 3, 2, 4).reshape(len(x), len(rows), len(columns), side * side)


def _columns(layer: Layer, kernel_size: int, x: Images) -> Float[Array, "batch height width rows_of_w"]:
    """C: patches, ones for the bias, and zeros up to a multiple of `_ALIGNMENT`."""
    patches = _patches(layer, kernel_size, x)
    before = ((0, 0), (0, 0), (0, 0))
    patches = jnp.pad(patches, (*before, (0, 1)), constant_values=1)
    patches = jnp.pad(patches, (*before, (0, -patches.shape[-1] % _ALIGNMENT)))
    return lax.optimization_barrier(patches)  # made once, and kept for the backward pass


def _matrix(layer: Layer, kernel: Kernel, bias: Float[Array, " out"] | None) -> Float[Array, "rows_of_w p_p out"]:
    """W, linear in kernel and bias."""
    copies = in_windows(kernel, layer.pool_size or 1)
    matrix = copies.reshape(-1, *copies.shape[3:])
    last = jnp.zeros_like(matrix[:1]) if bias is None else jnp.broadcast_to(bias, (1, *matrix.shape[1:]))
    matrix = jnp.concatenate([matrix, last])
    return jnp.pad(matrix, ((0, -len(matrix) % _ALIGNMENT), (0, 0), (0, 0)))


def _forward(
    layer: Layer, x: Images, kernel: Kernel, bias: Array | None
) -> tuple[Outputs, Array, UInt8[Array, "..."] | None]:
    """The layer's outputs, C, and with a bias which element of its window each maximum is."""
    columns = _columns(layer, len(kernel), x)
    matrix = _matrix(layer, kernel, bias).astype(x.dtype)
    y = jnp.einsum("bhwc,cqf->bhwqf", columns, matrix)
    if bias is None:
        return y[..., 0, :], columns, None
    maxima, index = largest_of([y[..., q, :] for q in range(y.shape[3])])
    return jax.nn.relu(maxima), columns, jnp.where(maxima > 0, index, jnp.uint8(y.shape[3]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolution(layer: Layer, x: Images, kernel: Kernel, bias: Float[Array, " out"] | None) -> Outputs:
    """The convolution of `layer`, and with a bias also relu and the maxima over its windows, in the type of `x`.

    The same as `matmul_conv.convolution`, of images [batch, height, width, 1] with a kernel [k, k, 1, out].
    """
    return _forward(layer, x, kernel, bias)[0]


def _convolution_fwd(layer, x, kernel, bias):
    out, columns, index = _forward(layer, x, kernel, bias)
    return out, (x, columns, index, kernel, bias)


def _convolution_bwd(layer, residuals, gradient) -> tuple[Any, Any, Any]:
    x, columns, index, kernel, bias = residuals
    d_y = gradient[..., None, :]
    if index is not None:
        element = jnp.arange(layer.pool_size**2, dtype=index.dtype)[:, None]
        d_y = jnp.where(index[..., None, :] == element, d_y, 0)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    d_matrix = jnp.einsum("bhwc,bhwqf->cqf", columns, d_y, preferred_element_type=wide)
    parameters = (kernel,) if bias is None else (kernel, bias)
    to_matrix = jax.linear_transpose(lambda kernel, bias=None: _matrix(layer, kernel, bias), *parameters)
    d_parameters = to_matrix(d_matrix.astype(kernel.dtype))
    matrix = _matrix(layer, kernel, bias).astype(x.dtype)
    d_columns = jnp.einsum("bhwqf,cqf->bhwc", d_y, matrix, preferred_element_type=wide)
    to_patches = jax.linear_transpose(partial(_patches, layer, len(kernel)), x.astype(wide))
    (d_x,) = to_patches(d_columns[..., : _side(layer, len(kernel)) ** 2])
    return d_x.astype(x.dtype), d_parameters[0], None if bias is None else d_parameters[1]


convolution.defvjp(_convolution_fwd, _convolution_bwd)
