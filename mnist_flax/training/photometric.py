"""Photometric augmentation: what happens to the grey levels of an image, not to the place of its digit.

Each kind happens to an example with the same probability, whatever the others do, and draws the same numbers
whichever others are on. Kinds are general ones, in the order in which they are applied: of the filter, the ink, the
paper and the light, and of the camera.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jaxtyping import Float, Key

from mnist_flax.ops.random import Strength, gaussian_matrix, random_bytes, uniform_bytes

Image = Float[Array, "height width"]

_LINES = 4  # that may be drawn
_FINEST, _COARSEST = 0.5, 10.0  # pixels, width of the smoothing of clouds
_REACH = 2  # pixels, of a filter to each side


def photometric(
    keys: Key[Array, " batch"],
    images: Float[Array, "batch height width"],
    strength: Mapping[str, Strength],
    probability: Strength,
) -> Float[Array, "batch height width"]:
    """Changes the grey levels of images in [0, 1] at random, by their own keys; they stay within.

    `strength` holds the kinds that are on, of `KINDS`, in their units in configs/default.py. Each happens to an image
    with `probability`.
    """
    for number, (kind, change) in enumerate(KINDS.items()):
        if kind in strength:
            kind_keys = jax.vmap(random.fold_in, (0, None))(keys, number)
            images = jax.vmap(partial(_sometimes, change, strength[kind], probability))(kind_keys, images)
    return images


def _sometimes(change: Callable, limit: Strength, probability: Strength, key: Key[Array, ""], image: Image) -> Image:
    chance, *draws = random.split(key, 3)
    return jnp.where(random.uniform(chance) < probability, change(*draws, image, limit), image)


def random_conv(key: Key[Array, ""], more: Key[Array, ""], image: Image, limit: Strength) -> Image:
    """Mixed with what a random filter of 5 x 5 pixels makes of it (Xu et al. 2021), up to a share of `limit`.

    The filter's weights are normal; a constant is taken from them, between nothing and their mean, so that some blur
    and others find edges. Its result is taken without sign, and scaled to a maximum of 1.
    """
    side = 2 * _REACH + 1
    weights = random.normal(key, (side, side))
    share, sign, level = random.uniform(more, (3,))
    weights = jnp.where(sign < 0.5, weights, jnp.abs(weights))
    weights = weights - level * weights.mean()
    response = jnp.abs(correlate(image, weights))
    share = limit * share
    return (1 - share) * image + share * response / jnp.maximum(response.max(), 1e-3)


def correlate(image: Image, weights: Float[Array, "side side"]) -> Image:
    """The sum of each pixel's neighbours, times their `weights`; around the image is 0. `side` is odd."""
    side = len(weights)
    padded = jnp.pad(image, side // 2)
    height, width = image.shape
    moved = [
        weights[row, column] * lax.slice(padded, (row, column), (row + height, column + width))
        for row in range(side)
        for column in range(side)
    ]
    return sum(moved[1:], moved[0])


def strokes(key: Key[Array, ""], more: Key[Array, ""], image: Image, limit: Strength) -> Image:
    """With up to four straight lines of random ends, ink and width, up to `limit` pixels to each side."""
    ends = random.uniform(key, (_LINES, 2, 2)) * jnp.array(image.shape)
    ink, width, drawn = random.uniform(more, (3, _LINES))
    ink = jnp.where(drawn < 0.5, ink, 0.0)[:, None, None]
    rows, columns = image.shape
    covered = jax.vmap(line, (0, 0, None))(ends, limit * width, (rows, columns))
    return jnp.maximum(image, (ink * covered).max(0))


def line(ends: Float[Array, "2 2"], width: Strength, shape: tuple[int, int]) -> Image:
    """The share of each pixel that is within `width` pixels of a line from one (row, column) to another, about."""
    (top, left), (down, right) = ends[0], ends[1] - ends[0]
    below, beside = jnp.arange(shape[0])[:, None] - top, jnp.arange(shape[1]) - left
    # The nearest point of the line, as a share of the way along it.
    along = jnp.clip((below * down + beside * right) / (down**2 + right**2 + 1e-3), 0, 1)
    distance = jnp.sqrt((below - along * down) ** 2 + (beside - along * right) ** 2)
    return jnp.clip(width + 0.5 - distance, 0, jnp.minimum(2 * width, 1))


def inverted(key: Key[Array, ""], more: Key[Array, ""], image: Image, limit: Strength) -> Image:
    """Inverted within a random rectangle or all around it, up to `limit`, where 1 exchanges black and white."""
    inside = []
    for size, ends in zip(image.shape, random.uniform(key, (2, 2)), strict=True):
        first, last = jnp.sort((2 * ends - 0.5) * size)  # from half a side before the image to half a side after it
        inside.append((jnp.arange(size) >= first) & (jnp.arange(size) <= last))
    amount, outside = random.uniform(more, (2,))
    where = (inside[0][:, None] & inside[1]) ^ (outside < 0.5)
    return jnp.where(where, image + limit * amount * (1 - 2 * image), image)


def tone_jitter(key: Key[Array, ""], more: Key[Array, ""], image: Image, limit: Strength) -> Image:
    """With a brighter black, up to `limit`, and less contrast above it, by up to the same share."""
    black, loss = limit * random.uniform(key, (2,))
    return black + (1 - black) * (1 - loss) * image


def smooth_noise(key: Key[Array, ""], more: Key[Array, ""], image: Image, limit: Strength) -> Image:
    """Mixed with smooth noise from 0 to 1, up to a share of `limit`.

    The width of its smoothing is drawn anew each time, uniform in its logarithm from half a pixel to ten.
    """
    share, scale = random.uniform(key, (2,))
    sigma = _FINEST * (_COARSEST / _FINEST) ** scale
    down, across = (gaussian_matrix(size, sigma) for size in image.shape)
    field = jnp.matmul(down, jnp.matmul(uniform_bytes(more, image.shape), across.T))
    field = field - field.min()
    share = limit * share
    return (1 - share) * image + share * field / field.max()


def pixel_noise(key: Key[Array, ""], more: Key[Array, ""], image: Image, limit: Strength) -> Image:
    """With up to `limit` of the pixels replaced by any grey level."""
    chance, grey = random_bytes(more, (2, *image.shape)).astype(jnp.float32) / 255
    return jnp.where(chance < limit * random.uniform(key), grey, image)


KINDS: dict[str, Callable] = {
    "filter": random_conv,
    "strokes": strokes,
    "invert": inverted,
    "tone": tone_jitter,
    "clouds": smooth_noise,
    "specks": pixel_noise,
}
