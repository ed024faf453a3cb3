"""Telling ink from paper: any lighting, dark on light or light on dark, noise."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mnist_flax.ocr.decode import Grey

Mask = Bool[np.ndarray, "height width"]

LOW, HIGH = 0.35, 0.6  # share of the ink's contrast that a stroke has everywhere, and somewhere
EDGE, STEEPNESS = 0.4, 1.5  # share at which a stroke ends; levels a share there
FAINT = 0.2  # share of the ink's contrast that printed rules have
LEAST_CONTRAST = 0.08  # share of the paper's light that ink must take to be ink
_FLAT = 1e-4  # levels that are no further apart are one: 256 bins between them are too fine for float32
_OVERVIEW = 36  # pixels of the longer side, for what varies slowly


class Ink(NamedTuple):
    share: Grey  # darkness, as a share of that of full ink
    mask: Mask  # strokes
    faint: Mask  # strokes, and all that is paler but no noise: printed rules


def find_ink(grey: Grey, scale: float | None = None) -> Ink:
    """Separates ink from paper.

    The paper's brightness is estimated around each pixel, and ink is what takes away at least half of the light
    that the darkest strokes take (with hysteresis, Canny 1986), so shadows and gradients do not matter.

    Args:
      grey: 0 black to 1 white; which of the two is the ink is found out.
      scale: height of a digit in pixels where it is known: the paper is then looked for around each digit,
        and noise is smoothed as far as digits allow.

    Returns:
      All in the shape of `grey`; empty where there is no contrast.
    """
    from scipy import ndimage
    from skimage import filters

    if scale:
        grey = ndimage.gaussian_filter(grey, 0.02 * scale)
    if ink_is_light(grey):
        grey = 1 - grey
    darkness = _darkness(grey, scale)
    # A robust spread: half of a page at least is paper.
    spread = 1.4826 * float(np.median(np.abs(darkness - np.median(darkness))))
    contrast = ink_contrast(darkness, max(LEAST_CONTRAST, 4 * spread))
    if contrast is None:
        nothing = np.zeros(grey.shape, bool)
        return Ink(nothing.astype(np.float32), nothing, nothing)
    share, noise = darkness / contrast, 3 * spread / contrast
    strokes = filters.apply_hysteresis_threshold(share, max(LOW, noise), max(HIGH, noise))
    mask = strokes & (share >= EDGE)
    return Ink(share, mask, mask | (share > max(FAINT, noise)))


def level(share: Grey) -> Grey:
    """How much of a pixel is ink, 0 to 1: the edges of strokes steeper than the lens left them."""
    return np.clip(0.5 + STEEPNESS * (share - EDGE), 0, 1)


def ink_is_light(grey: Grey) -> bool:
    """Whether the picture is light on dark: ink is what there is less of, and what seldom touches the edge."""
    from skimage import filters

    small = _overview(grey, 96)
    flat = small - _resize(_background(_overview(small, _OVERVIEW), 50, 1 / 3), small.shape)
    if np.ptp(flat) < _FLAT:
        return False
    light = flat > filters.threshold_otsu(flat)
    edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    return bool(0.5 * light.mean() + 0.5 * edge.mean() < 0.5)


def ink_contrast(darkness: Grey, least: float) -> float | None:
    """Darkness of full ink: the 80th percentile of what Otsu's threshold takes for ink; None if there is no ink."""
    from skimage import filters

    candidates = darkness[darkness > least]
    if candidates.size < 4:
        return None
    # Two kinds of marks, say pale rules and dark ink, or edges and the middle of strokes: the darker counts.
    threshold = filters.threshold_otsu(candidates) if np.ptp(candidates) > _FLAT else 0.0
    return float(np.percentile(candidates[candidates >= threshold], 80))


def _darkness(grey: Grey, scale: float | None) -> Grey:
    """Share of the paper's light that each pixel lacks: the light cancels out (Retinex)."""
    if scale:
        step = max(1.0, scale / 4)
        shape = [max(1, round(n / step)) for n in grey.shape]
        small = _resize(grey, shape)
        paper = _background(small, 70, 2 * scale / step / max(small.shape))
    else:
        small = _overview(grey, _OVERVIEW)
        paper = _background(small, 80, 1 / 3)
    paper = _resize(paper, grey.shape)
    return np.clip((paper - grey) / np.maximum(paper, 0.02), 0, 1)  # black on black is no ink


def _background(small: Grey, percentile: float, share: float) -> Grey:
    """The paper around each pixel: a percentile over a window of a share of the longer side, smoothed."""
    from scipy import ndimage

    window = max(3, round(share * max(small.shape)))
    paper = ndimage.percentile_filter(small, percentile, window, mode="nearest")
    return ndimage.gaussian_filter(paper, window / 4, mode="nearest")


def _overview(grey: Grey, longest: int) -> Grey:
    factor = min(1.0, longest / max(grey.shape))
    return _resize(grey, [max(1, round(n * factor)) for n in grey.shape])


def _resize(grey: Grey, shape) -> Grey:
    if tuple(shape) == grey.shape:
        return grey
    image = Image.fromarray(np.ascontiguousarray(grey, np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
