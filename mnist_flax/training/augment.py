"""Augmentation on the device: affine maps and grey levels, as pure functions of PRNG keys.

All geometric kinds compose into one warp, so that an image is resampled once: an inverse affine map about
its centre, then one bilinear interpolation. Every example has its own key, so that
what happens to it depends on neither the batch around it nor the number of devices, and a kind draws the
same numbers whichever other kinds are on.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, random
from jaxtyping import Float, Key

from mnist_flax.ops.random import Strength
from mnist_flax.training.photometric import KINDS as PHOTOMETRIC
from mnist_flax.training.photometric import photometric

MOVES = ("rotation", "shift", "zoom", "shear")
KINDS = (*MOVES, *PHOTOMETRIC, "probability")


def augment(
    keys: Key[Array, " batch"], images: Float[Array, "batch height width"], strength: Mapping[str, Strength]
) -> Float[Array, "batch height width"]:
    """Distorts each image at random, by its own key: geometry first, then grey levels (`photometric`).

    `strength` holds the kinds that are on, under their names and in their units in configs/default.py; a
    kind that is missing is not compiled. Values may be traced. Nothing photometric happens without a
    probability. What comes from outside an image is 0, the background.
    Raises ValueError for a name not in `KINDS`.
    """
    if unknown := sorted(strength.keys() - set(KINDS)):
        raise ValueError(f"unknown augmentation {', '.join(unknown)}: choose from {', '.join(KINDS)}")
    shape = (images.shape[1], images.shape[2])
    if set(MOVES) & strength.keys():
        # Five numbers in [0, 1) an example, each with its fixed place.
        draws = jax.vmap(lambda key: random.uniform(key, (5,)))(keys)
        rotation, zoom, shear, *shift = (2.0 * draws - 1.0).T
        matrices = affine_matrix(
            rotation * strength.get("rotation", 0.0),
            jnp.stack(shift, axis=1) * strength.get("shift", 0.0),
            1.0 + zoom * strength.get("zoom", 0.0),
            shear * strength.get("shear", 0.0),
            shape,
        )
        images = warp(images, affine_coordinates(matrices, shape))
    if PHOTOMETRIC.keys() & strength.keys():
        photometric_keys = jax.vmap(random.fold_in, (0, None))(keys, 2)
        images = photometric(photometric_keys, images, strength, strength.get("probability", 0.0))
    return images


def strength_at(epoch: Float[Array, ""], num_epochs: Strength, fields: Mapping[str, Strength]) -> dict[str, Strength]:
    """What `augment` takes, at a time in training, of the `fields` of config.augment that are not 0.

    In the last `final_epochs` everything is multiplied by `final_scale`, so that training ends on images more like
    those that are to be classified (He et al. 2019, arXiv:1909.09148).
    """
    strength = {kind: fields[kind] for kind in KINDS if kind in fields}
    if "final_epochs" not in fields:
        return strength
    scale = jnp.where(epoch < num_epochs - fields["final_epochs"], 1.0, fields.get("final_scale", 0.0))
    return {kind: scale * value for kind, value in strength.items()}


def affine_matrix(
    rotation: Float[Array, " batch"],
    shift: Float[Array, "batch 2"],
    zoom: Float[Array, " batch"],
    shear: Float[Array, " batch"],
    shape: tuple[int, int],
) -> Float[Array, "batch 2 3"]:
    """Inverse maps: each takes a pixel (row, column, 1) of the result to its place in the image.

    The image is scaled by `zoom`, sheared along its rows by the tangent `shear` (positive leans the top to
    the right), rotated by `rotation` degrees (positive is clockwise), all about its centre, then moved by
    `shift` (row, column) pixels. `shape` is (height, width).
    """
    angle = jnp.deg2rad(rotation)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows = [jnp.stack([cos, -sin], axis=-1), jnp.stack([sin + shear * cos, cos - shear * sin], axis=-1)]
    linear = jnp.stack(rows, axis=-2) / zoom[..., None, None]
    centre = (jnp.array(shape) - 1) / 2
    # A sum of products, not a matrix product: those are rounded to fewer bits on accelerators by default.
    offset = centre - jnp.sum(linear * (centre + shift)[..., None, :], axis=-1)
    return jnp.concatenate([linear, offset[..., None]], axis=-1)


def pixel_grid(shape: tuple[int, int]) -> Float[Array, "2 height width"]:
    """Row and column of each pixel."""
    return jnp.stack(jnp.meshgrid(*(jnp.arange(size, dtype=jnp.float32) for size in shape), indexing="ij"))


def affine_coordinates(
    matrices: Float[Array, "batch 2 3"], shape: tuple[int, int]
) -> Float[Array, "batch 2 height width"]:
    """Where each pixel of the result comes from, for inverse maps as `affine_matrix` gives them."""
    points = jnp.concatenate([pixel_grid(shape), jnp.ones((1, *shape))]).reshape(3, -1)
    # A product of matrices, although it is a small one: see `warp`.
    coordinates = jnp.matmul(matrices.reshape(-1, 3), points, precision="highest")
    return coordinates.reshape(-1, 2, *shape)


def warp(
    images: Float[Array, "batch height width"], coordinates: Float[Array, "batch 2 height width"]
) -> Float[Array, "batch height width"]:
    """Samples each image at (row, column) `coordinates` by bilinear interpolation; all around it is 0.

    In a compiled program the coordinates must be an input or a matrix product. XLA may
    compute a longer formula twice, once for the pixel numbers and once for the weights, each rounded its own
    way, and where the two fall on either side of a whole number the wrong pixel is taken. A matrix product
    is computed once, which is also several times faster.
    """
    batch, height, width = images.shape
    # One pixel of background before the image and two after it, so that all four neighbours always exist.
    padded = jnp.pad(images, ((0, 0), (1, 2), (1, 2))).reshape(batch, -1)
    stride = width + 3
    rows, columns = jnp.clip(coordinates[:, 0], -1, height), jnp.clip(coordinates[:, 1], -1, width)
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = rows - top, columns - left
    first = ((top + 1) * stride + left + 1).astype(jnp.int32).reshape(batch, -1)

    def neighbour(offset: int) -> Float[Array, "batch height width"]:
        pixels = jnp.take_along_axis(padded, first + offset, axis=1, mode="promise_in_bounds")
        return pixels.reshape(images.shape)

    above = (1 - right) * neighbour(0) + right * neighbour(1)
    below = (1 - right) * neighbour(stride) + right * neighbour(stride + 1)
    return (1 - down) * above + down * below
