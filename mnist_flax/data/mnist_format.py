"""MNIST's own form of a digit: 20 x 20 box, anti-aliased, centre of mass in the middle of 28 x 28."""

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

SIZE, BOX = 28, 20


def mnist_form(ink: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "28 28"]:
    """A digit in the form of LeCun et al. 1998: scaled to fit 20 x 20, its centre of mass on pixel (14, 14).

    Args:
      ink: 0 is paper and 1 is ink, any size; what surrounds the digit is cut off.

    Returns:
      255 is ink. All zeros if there is no ink.
    """
    rows, columns = (np.flatnonzero((ink >= 0.5).any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((SIZE, SIZE), np.uint8)
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = crop.shape
    scale = BOX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # The mean over each pixel's area; the nearest pixel, which that is in enlarging, would leave steps.
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    image = Image.fromarray(np.ascontiguousarray(crop, np.float32))
    digit = np.clip(np.asarray(image.resize(size, resampling)), 0, 1)
    return np.rint(255 * centred(digit)).astype(np.uint8)


def centred(digit: Shaped[np.ndarray, "height width"]) -> Shaped[np.ndarray, "28 28"]:
    """Places a digit, light on black, in 28 x 28 with its centre of mass on pixel (14, 14), where MNIST has it."""
    padding = []
    for axis, length in enumerate(digit.shape):
        profile = digit.sum(axis=1 - axis, dtype=np.float64)
        centre = float(profile @ np.arange(length) / profile.sum())
        before = int(np.clip(round(SIZE / 2 - centre), 0, SIZE - length))
        padding.append((before, SIZE - length - before))
    return np.pad(digit, padding)
