"""Printed lines on the paper: how far it is turned, and ink without rules, boxes and grids."""

import numpy as np
from jaxtyping import Bool

from mnist_flax.ink import Ink

Mask = Bool[np.ndarray, "height width"]

LONGEST_STROKE = 1.8  # digit heights: what is straight and longer is a rule
THICKEST_RULE = 0.25  # digit heights
PALE = 0.75  # share of the ink's darkness: what rules have that are paler than ink
_MAX_TILT = 8.0  # degrees


def tilt(mask: Mask) -> float:
    """Degrees by which rows of ink fall to the right: where their projection is most uneven (Postl 1986)."""
    y, x = np.nonzero(mask)
    if len(y) < 50:
        return 0.0
    if len(y) > 30_000:  # enough to tell
        keep = np.linspace(0, len(y) - 1, 30_000).astype(int)
        y, x = y[keep], x[keep]

    def unevenness(degrees: float) -> float:
        rows = np.rint(y - x * np.tan(np.deg2rad(degrees))).astype(np.int64)
        return float((np.bincount(rows - rows.min()).astype(np.float64) ** 2).sum())

    coarse = max(np.arange(-_MAX_TILT, _MAX_TILT + 0.1, 0.5), key=unevenness)
    best = max(np.arange(coarse - 0.4, coarse + 0.45, 0.1), key=unevenness)
    return float(best) if unevenness(best) > 1.1 * unevenness(0.0) else 0.0


def remove_rules(ink: Ink, height: float) -> tuple[Ink, Mask]:
    """Ink without rules, boxes and grids, strokes that cross a rule mended; and the vertical rules.

    A rule is a run of ink that is straight, thin, and longer than any stroke of a digit of `height` pixels, or
    one that is part of a closed frame. It may bend and rise a little, as on photographed paper.
    """
    frames = _frames(ink.faint, height)
    sizes = {"stroke": height, "shortest": LONGEST_STROKE * height}
    vertical = _lines(ink.faint.T, frames=[(box[1], box[0]) for box in frames], **sizes).T
    return _without(ink, _lines(ink.faint, frames=frames, **sizes) | vertical, height), vertical


def remove_longest_rules(ink: Ink, shortest: float) -> Ink:
    """Ink without lines from edge to edge of the picture, or of at least `shortest` pixels.

    For a picture of digits whose size is not known, and cannot be while squared paper connects them.
    """
    rows, columns = ink.mask.shape
    stroke = 0.05 * max(rows, columns)
    horizontal = _lines(ink.faint, stroke, min(shortest, 0.97 * columns), [])
    vertical = _lines(ink.faint.T, stroke, min(shortest, 0.97 * rows), []).T
    return _without(ink, horizontal | vertical, stroke)


def _without(ink: Ink, rules: Mask, height: float) -> Ink:
    from scipy import ndimage

    if not rules.any():
        return ink
    strokes = ink.mask & ~rules
    # Where ink is darker than the rule that it crosses, that tells them apart.
    tone = float(np.percentile(ink.share[rules], 75))
    if tone < PALE:
        crossing = ink.mask & rules & (ink.share > (1 + tone) / 2)
        strokes = ndimage.binary_propagation(strokes, np.ones((3, 3)), strokes | crossing)
    mended = strokes | (_bridged(strokes, rules, height) & ink.mask)
    return Ink(ink.share * ~(rules & ~mended), mended, (ink.faint & ~rules) | mended)


def _bridged(strokes: Mask, rules: Mask, height: float) -> Mask:
    """Where rules run between ink on either side: closing along columns, rows and diagonals."""
    from scipy import ndimage

    thickness = max(3, int(2 * ndimage.distance_transform_cdt(rules, "chessboard").max()) + 2)
    thickness = min(thickness, round(THICKEST_RULE * height) + 3) | 1
    line = np.ones((1, thickness), bool)
    diagonal = np.eye(thickness, dtype=bool)
    bridged = np.zeros_like(strokes)
    for element in (line, line.T, diagonal, diagonal[::-1]):
        bridged |= ndimage.binary_closing(strokes, element)
    return bridged & rules


def _frames(faint: Mask, height: float) -> list[tuple[slice, slice]]:
    """Bounding boxes of marks whose four sides are drawn: boxes, combs and tables."""
    from scipy import ndimage

    labels, _ = ndimage.label(faint, np.ones((3, 3)))
    frames = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = (part.stop - part.start for part in box)
        if min(rows, columns) < height:
            continue
        mark = labels[box] == number
        depth = max(2, round(0.12 * min(rows, columns)))
        sides = (mark[:depth].any(0), mark[-depth:].any(0), mark[:, :depth].any(1), mark[:, -depth:].any(1))
        if all(side.mean() > 0.85 for side in sides):
            frames.append(box)
    return frames


def _lines(faint: Mask, stroke: float, shortest: float, frames: list[tuple[slice, slice]]) -> Mask:
    """Pixels of horizontal lines that are longer than `shortest` pixels, or cross one of the frames.

    `stroke` is the length of what need not be straight: the height of a digit.
    """
    from scipy import ndimage

    gap = max(1, round(0.05 * stroke))
    closed = _opened(~_opened(~np.pad(faint, ((0, 0), (gap, gap))), 2 * gap + 1), 1)[:, gap:-gap] | faint
    runs = _opened(closed, round(0.7 * stroke) | 1)
    labels, _ = ndimage.label(runs, np.ones((3, 3)))
    rules = np.zeros_like(faint)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        length = columns.stop - columns.start
        if length < shortest and not any(
            _inside(rows, frame[0]) and _inside(columns, frame[1]) and length > 0.8 * _least_side(frame)
            for frame in frames
        ):
            continue
        part = labels[rows, columns] == number
        counts = part.sum(0)
        # Strokes may lie along the line: it is where it is thin.
        thickness = float(np.percentile(counts[counts > 0], 25))
        if thickness > THICKEST_RULE * stroke or length < 5 * thickness:
            continue
        middle = (part * np.arange(len(part))[:, None]).sum(0) / np.maximum(counts, 1)
        known = np.flatnonzero((counts > 0) & (counts <= 1.3 * thickness + 1))
        middle = np.interp(np.arange(length), known, middle[known])
        middle = ndimage.median_filter(middle, min(length, round(2 * stroke)), mode="nearest")
        reach = int(thickness / 2 + 1.5)
        for offset in range(-reach, reach + 1):
            y = np.rint(middle).astype(int) + offset + rows.start
            valid = (y >= 0) & (y < len(rules))
            rules[y[valid], np.arange(columns.start, columns.stop)[valid]] = True
    return rules & ndimage.binary_dilation(faint)


def _inside(inner: slice, outer: slice) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def _least_side(box: tuple[slice, slice]) -> int:
    return min(part.stop - part.start for part in box)


def _opened(mask: Mask, length: int) -> Mask:
    """Runs along rows of at least `length` (odd) pixels; beyond the picture there is nothing."""
    from scipy import ndimage

    if length == 1:
        return mask
    eroded = ndimage.minimum_filter1d(mask.astype(np.uint8), length, axis=1, mode="constant")
    return ndimage.maximum_filter1d(eroded, length, axis=1, mode="constant").astype(bool)


def digit_height(mask: Mask) -> float:
    """Pixels of a typical digit's height: the median over marks that may be digits, large ones counting more.

    Marks that are far wider than high, or closed frames, are none. 0 where there is no ink.
    """
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    boxes = ndimage.find_objects(labels)
    if not boxes:
        return 0.0
    size = np.array([[part.stop - part.start for part in box] for box in boxes])
    possible = (size[:, 1] < 3 * size[:, 0]) & (size[:, 0] < 12 * size[:, 1])
    framed = {(box[0].start, box[1].start) for box in _frames(mask, max(6.0, 0.02 * max(mask.shape)))}
    possible &= [(box[0].start, box[1].start) not in framed for box in boxes]
    if not possible.any():
        return 0.7 * float(np.median(size[:, 0]))
    heights = np.sort(size[possible, 0])
    weights = np.cumsum(heights.astype(np.float64) ** 2)
    return float(heights[np.searchsorted(weights, weights[-1] / 2)])
