"""The fifteen corruptions of MNIST-C (Mu and Gilmer 2019, arXiv:1906.02337), each at five severities.

Written anew from the paper and the constants of its authors' code (github.com/google-research/mnist-c), of which
`Family.published` is the severity of their published set. Eleven families have their five severities there; stripe,
dotted line, zigzag and Canny edges have one form only, and severities of ours around it: the width of the stripes,
the number of lines, and the share of the edges in a mixture with the image. None was chosen with a model at hand.
Two known differences: glass blur smooths along both axes (the original, through an argument for colour images, along
one), and motion blur follows ImageMagick's kernel without its rounding to bytes between steps.

What happens to an image depends on the seed, the family and the image's number alone, not on those beside it, and
more severe forms of it use the same random numbers.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from mnist_flax.data.idx import IMAGE_SIZE as SIZE

SEVERITIES = (1, 2, 3, 4, 5)
CENTRE = (SIZE - 1) / 2

Images = Float[np.ndarray, "images 28 28"]  # within [0, 1], 0 is the background
Numbers = Int[np.ndarray, " images"]  # of the images in their split
Draw = Callable[[Numbers, int], Float[np.ndarray, "images count"]]  # uniform in [0, 1); the first ones always the same


class Family(NamedTuple):
    """A corruption: `apply(images, numbers, draw, level)`, and its level at each severity."""

    apply: Callable[[Images, Numbers, Draw, Any], Images]
    levels: tuple  # one a severity
    published: int  # severity of the published MNIST-C set


def corrupt(
    images: UInt8[np.ndarray, "images 28 28"], name: str, severity: int, numbers: Numbers | None = None, seed: int = 0
) -> UInt8[np.ndarray, "images 28 28"]:
    """Corrupted images.

    Args:
      images: pixels 0..255, a light digit on a dark ground.
      name: one of `FAMILIES`.
      severity: 1 to 5.
      numbers: of the images in their split, which choose the random numbers; by default 0, 1, ...
      seed: another seed, another corrupted set.
    """
    family = FAMILIES[name]
    level = family.levels[SEVERITIES.index(severity)]
    numbers = np.arange(len(images)) if numbers is None else numbers
    return to_bytes(family.apply(images / 255, numbers, partial(_uniform, seed, name), level))


def to_bytes(images: Images) -> UInt8[np.ndarray, "images 28 28"]:
    """Pixels 0..255 of images in [0, 1]; what is outside of it is clipped."""
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)


def affine(
    images: Images, matrix: Float[np.ndarray, "*images 2 2"], shift: Float[np.ndarray, "*images 2"] | float = 0.0
) -> Images:
    """Samples images bilinearly at `matrix` times (row, column) about their centre, plus `shift`; around them is 0.

    So `matrix` is the inverse of what happens to the digit, and `shift` is where it is taken from. One matrix and
    shift for all images, or one for each.
    """
    from scipy import ndimage

    matrices = np.broadcast_to(matrix, (len(images), 2, 2))
    offsets = CENTRE - matrices.sum(axis=2) * CENTRE + shift
    warped = np.empty(images.shape)
    for image, inverse, offset, output in zip(images, matrices, offsets, warped, strict=True):
        ndimage.affine_transform(image, inverse, offset, output=output, order=1, mode="grid-constant")
    return warped


def _uniform(seed: int, name: str, numbers: Numbers, count: int) -> Float[np.ndarray, "images count"]:
    key = np.array([seed % 2**64, zlib.crc32(name.encode())], np.uint64)
    # Raw output, which NumPy promises for good; a number's stream starts where 2**64 counts of it lie ahead.
    streams = (np.random.Philox(key=key, counter=[0, int(number), 0, 0]) for number in numbers)
    words = [stream.random_raw(count) for stream in streams]
    return (np.array(words, np.uint64).reshape(len(numbers), count) >> np.uint64(11)) * 2.0**-53


def _per_pixel(numbers: Numbers, draw: Draw) -> Images:
    return draw(numbers, SIZE * SIZE).reshape(-1, SIZE, SIZE)


def _sign(uniform: np.ndarray) -> np.ndarray:
    return np.where(uniform < 0.5, -1.0, 1.0)


def _blur(images: Images, sigma: float) -> Images:
    from scipy import ndimage

    return ndimage.gaussian_filter(images, (0, sigma, sigma), mode="nearest")


def _shot_noise(images: Images, numbers: Numbers, draw: Draw, photons: float) -> Images:
    """Each pixel a Poisson count over the `photons` that white has."""
    from scipy import stats

    # The inverse distribution function of all 256 rates, as one sorted table: grey levels apart by 1.
    counts = np.arange(stats.poisson.isf(1e-12, photons) + 1)
    levels = np.arange(256)[:, None]
    table = levels + stats.poisson.cdf(counts, photons * levels / 255)
    grey = np.rint(255 * images).astype(int)
    places = np.searchsorted(table.ravel(), grey + _per_pixel(numbers, draw))
    return (places - grey * len(counts)) / photons


def _impulse_noise(images: Images, numbers: Numbers, draw: Draw, amount: float) -> Images:
    """Salt and pepper, half each, in an `amount` of the pixels."""
    uniform = _per_pixel(numbers, draw)
    return np.where(uniform < amount / 2, 0.0, np.where(uniform >= 1 - amount / 2, 1.0, images))


def _glass_blur(images: Images, numbers: Numbers, draw: Draw, level: tuple[float, int, int]) -> Images:
    """Pixels swapped with neighbours, at random and one after another, between two Gaussian blurs."""
    sigma, reach, rounds = level
    pixels = np.ascontiguousarray(_blur(images, sigma).reshape(-1, SIZE * SIZE).T)
    side = range(SIZE - reach, reach, -1)
    places = [row * SIZE + column for row in side for column in side] * rounds
    # One random number a swap: in the upper half which neighbour, `reach` up or left to `reach` - 1 down or right.
    choices = np.floor(draw(numbers, len(places)).T * 8 * reach**2).astype(int) - 4 * reach**2
    down, right = np.divmod(choices, 2 * reach)
    moves = np.where(choices < 0, 0, (down - reach) * SIZE + right - reach)
    every = np.arange(len(images))
    for place, move in zip(places, moves, strict=True):
        mine, theirs = pixels[place].copy(), pixels[place + move, every]
        pixels[place] = theirs
        pixels[place + move, every] = mine
    return _blur(pixels.T.reshape(images.shape), sigma)


def _motion_blur(images: Images, numbers: Numbers, draw: Draw, level: tuple[int, float]) -> Images:
    """A trail to one side, of falling Gaussian weight, at an angle within 45 degrees of the horizontal."""
    radius, sigma = level
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    angle = np.deg2rad(90 * draw(numbers, 1) - 45)
    rows, columns = (np.rint(distance * along(angle)).astype(int) for along in (np.sin, np.cos))
    grid, every = np.arange(SIZE), np.arange(len(images))[:, None, None]
    blurred = np.zeros(images.shape)
    for down, right, weight in zip(rows.T, columns.T, weights / weights.sum(), strict=True):
        row, column = (np.clip(grid + move[:, None], 0, SIZE - 1) for move in (down, right))
        blurred += weight * images[every, row[:, :, None], column[:, None, :]]
    return blurred


def _shear(images: Images, numbers: Numbers, draw: Draw, radians: float) -> Images:
    angle = radians * _sign(draw(numbers, 1)[:, 0])
    zero, one = np.zeros_like(angle), np.ones_like(angle)
    return affine(images, np.array([[np.cos(angle), zero], [-np.sin(angle), one]]).transpose(2, 0, 1))


def _scale(images: Images, numbers: Numbers, draw: Draw, size: float) -> Images:
    return affine(images, np.eye(2) / size)


def _rotate(images: Images, numbers: Numbers, draw: Draw, radians: float) -> Images:
    return affine(images, rotation(radians * _sign(draw(numbers, 1)[:, 0])))


def rotation(radians: Float[np.ndarray, "*images"] | float) -> Float[np.ndarray, "*images 2 2"]:
    """The matrix for `affine` that turns a digit clockwise."""
    cos, sin = np.cos(radians), np.sin(radians)
    return np.moveaxis(np.array([[cos, -sin], [sin, cos]]), (0, 1), (-2, -1))


def _brightness(images: Images, numbers: Numbers, draw: Draw, amount: float) -> Images:
    return images + amount


def _translate(images: Images, numbers: Numbers, draw: Draw, pixels: float) -> Images:
    return affine(images, np.eye(2), pixels * _sign(draw(numbers, 2)))


def _stripe(images: Images, numbers: Numbers, draw: Draw, columns: int) -> Images:
    """The outer columns inverted, at the left and at the right."""
    striped = images.copy()
    for side in (slice(None, columns), slice(SIZE - columns, None)):
        striped[:, :, side] = 1 - striped[:, :, side]
    return striped


def _fog(images: Images, numbers: Numbers, draw: Draw, level: tuple[float, float]) -> Images:
    """A plasma fractal over the image, which keeps its brightest value.

    A map is for four images, one at each side of a corner of it: around it all looks alike.
    """
    thickness, decay = level
    kept, place = np.unique(numbers // 4, return_inverse=True)
    along = np.arange(SIZE)
    fog = np.empty(images.shape)
    for first in range(0, len(kept), 64):  # a map has 65,536 points
        maps = plasma(draw(kept[first : first + 64], 4**8 - 1), decay)
        for i in np.flatnonzero((place >= first) & (place < first + 64)):
            rows, columns = (along if numbers[i] & bit else -along for bit in (1, 2))
            fog[i] = maps[place[i] - first][rows[:, None], columns]
    brightest = images.max(axis=(1, 2), keepdims=True)
    return (images + thickness * fog) * brightest / (brightest + thickness)


def plasma(uniform: Float[np.ndarray, "maps points"], decay: float) -> Float[np.ndarray, "maps side side"]:
    """Heights within [0, 1] by the diamond-square algorithm on a torus (Fournier, Fussell and Carpenter 1982).

    The random part of a height falls by `decay` squared from one halving of the grid to the next. Side 2**k takes
    4**k - 1 uniform numbers.
    """
    side = round((uniform.shape[1] + 1) ** 0.5)
    noise = 2 * uniform - 1
    heights = np.zeros((len(uniform), side, side))
    taken, step, amplitude = 0, side, 1.0

    def rough(mean: np.ndarray) -> np.ndarray:
        nonlocal taken
        fresh = noise[:, taken : taken + mean[0].size].reshape(mean.shape)
        taken += mean[0].size
        return mean / 4 + amplitude * fresh

    while step > 1:
        half = step // 2
        corners = heights[:, ::step, ::step]
        across, down = corners + np.roll(corners, -1, axis=2), corners + np.roll(corners, -1, axis=1)
        centres = rough(across + np.roll(across, -1, axis=1))
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = rough(across + centres + np.roll(centres, 1, axis=1))
        heights[:, half::step, ::step] = rough(down + centres + np.roll(centres, 1, axis=2))
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def _spatter(images: Images, numbers: Numbers, draw: Draw, level: tuple[float, float, float, float, float]) -> Images:
    """Opaque dark grey drops where smoothed noise is above a threshold."""
    from scipy import special

    mean, deviation, size, threshold, softness = level
    liquid = _blur(mean + deviation * special.ndtri(_per_pixel(numbers, draw) + 2.0**-54), size)
    cover = _blur((liquid > threshold).astype(float), softness)
    cover[cover < 0.8] = 0
    return images * (1 - cover) + 63 / 255 * cover


def _line(left: np.ndarray, top: np.ndarray, right: np.ndarray, bottom: np.ndarray) -> Images:
    """Lines from (`left`, `top`) to (`right`, `bottom`), columns and rows [images]; they fade out over 2.3 rows."""
    left, top, right, bottom = (np.asarray(end, float)[:, None, None] for end in (left, top, right, bottom))
    row, column = np.arange(SIZE)[:, None], np.arange(SIZE)
    distance = np.abs(row - top - (bottom - top) / (right - left) * (column - left))
    ink = 1 + np.log1p(-np.minimum(distance, 2) / 2.3)  # beyond 2 rows it is below 0
    inside = (column >= np.floor(left)) & (column < np.ceil(right))
    return np.where(inside, np.clip(ink, 0, 1), 0.0)


def _dotted_line(images: Images, numbers: Numbers, draw: Draw, lines: int) -> Images:
    """Lines from edge to edge, two columns drawn and two left out in turn."""
    ends = np.floor(27 * draw(numbers, 2 * lines))
    drawn = np.arange(SIZE) // 2 % 2
    left = np.zeros(len(images))
    for first, last in zip(ends.T[::2], ends.T[1::2], strict=True):
        images = np.minimum(images + drawn * _line(left, first, left + 27, last), 1)
    return images


def _zigzag(images: Images, numbers: Numbers, draw: Draw, lines: int) -> Images:
    """Zigzags two pixels high and four long to each side of lines from column 2 to 25 that rise or fall a little."""
    uniform = draw(numbers, 2 * lines)
    starts, climbs = np.floor(27 * uniform[:, ::2]), np.floor(10 * uniform[:, 1::2]) - 5
    for start, climb in zip(starts.T, climbs.T, strict=True):
        length, angle = np.hypot(23, climb), np.arctan2(climb, 23)
        end = np.stack([length, -1 / (length - 20)])  # after six turns, wherever it then is
        turns = [(np.full_like(length, 4 * i + 2), np.full_like(length, 2 * (-1) ** i)) for i in range(6)]
        along, aside = np.array([(0 * length, 0 * length), *turns, end]).transpose(1, 0, 2)
        columns = 2 + along * np.cos(angle) - aside * np.sin(angle)
        rows = start + along * np.sin(angle) + aside * np.cos(angle)
        for i in range(len(rows) - 1):
            images = np.minimum(images + _line(columns[i], rows[i], columns[i + 1], rows[i + 1]), 1)
    return images


def _canny_edges(images: Images, numbers: Numbers, draw: Draw, share: float) -> Images:
    """The image's edges (Canny 1986, scikit-image's defaults), mixed with the image."""
    from skimage import feature

    edges = np.array([feature.canny(image) for image in images])
    return (1 - share) * images + share * edges


FAMILIES = {
    "shot_noise": Family(_shot_noise, (60, 25, 12, 5, 3), 5),
    "impulse_noise": Family(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), 4),
    "glass_blur": Family(_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)), 1),
    "motion_blur": Family(_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), 1),
    "shear": Family(_shear, (0.2, 0.4, 0.6, 0.8, 1.0), 2),
    "scale": Family(_scale, (0.9, 0.8, 0.7, 0.6, 0.5), 3),
    "rotate": Family(_rotate, (0.2, 0.4, 0.6, 0.8, 1.0), 2),
    "brightness": Family(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), 5),
    "translate": Family(_translate, (1, 2, 3, 4, 5), 3),
    "stripe": Family(_stripe, (3, 5, 7, 9, 11), 3),
    "fog": Family(_fog, ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)), 5),
    "spatter": Family(
        _spatter,
        (
            *((0.65, 0.3, 4, 0.69, 0.6), (0.65, 0.3, 3, 0.68, 0.6), (0.65, 0.3, 2, 0.68, 0.5)),
            *((0.65, 0.3, 1, 0.65, 1.5), (0.67, 0.4, 1, 0.65, 1.5)),
        ),
        4,
    ),
    "dotted_line": Family(_dotted_line, (1, 2, 3, 4, 5), 1),
    "zigzag": Family(_zigzag, (1, 2, 3, 4, 5), 1),
    "canny_edges": Family(_canny_edges, (0.2, 0.4, 0.6, 0.8, 1.0), 5),
}
