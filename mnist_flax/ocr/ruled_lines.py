"""Printed lines on the paper: how far it is turned, and ink without rules, boxes and grids."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mnist_flax.ocr.binarize import Ink, Mask

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
    from scipy import ndimage

    near = 2 * max(1, round(0.03 * height)) + 1  # thin rules have gaps
    closed = ndimage.minimum_filter(ndimage.maximum_filter(ink.faint, near), near)
    frames = _frames(closed, height)
    sizes = {"stroke": height, "shortest": LONGEST_STROKE * height}
    turned = [frame._replace(rows=frame.columns, columns=frame.rows) for frame in frames]
    vertical = _lines(ink.faint.T, frames=turned, **sizes).T
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


class Frame(NamedTuple):
    """A mark whose four sides are drawn: a box, a comb or a table."""

    box: tuple[slice, slice]  # of all its ink, dirt that touches it included
    rows: slice  # from its upper to its lower side
    columns: slice


def _frames(faint: Mask, least: float) -> list[Frame]:
    """Frames whose sides are at least so many pixels long."""
    from scipy import ndimage

    labels, _ = ndimage.label(faint, np.ones((3, 3)))
    frames = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = (part.stop - part.start for part in box)
        if min(rows, columns) < least:
            continue
        mark = labels[box] == number
        depth = max(2, round(0.12 * min(rows, columns)))
        ends = [_sides(ndimage.maximum_filter1d(mark, depth, axis).mean(1 - axis)) for axis in (0, 1)]
        if all(stop - start > depth for start, stop in ends):
            inner = mark[tuple(slice(start, stop) for start, stop in ends)]
            corners = itertools.product((slice(depth), slice(-depth, None)), repeat=2)
            if all(inner[corner].any() for corner in corners):  # a 0 has none
                sides = (
                    slice(part.start + start + depth // 2, part.start + stop - depth // 2)
                    for part, (start, stop) in zip(box, ends, strict=True)
                )
                frames.append(Frame(box, *sides))
    return frames


def _lines(faint: Mask, stroke: float, shortest: float, frames: list[Frame]) -> Mask:
    """Pixels of horizontal lines that are longer than `shortest` pixels, or cross one of the frames.

    `stroke` is the length of what need not be straight: the height of a digit.
    """
    from scipy import ndimage

    gap = max(1, round(0.05 * stroke))
    closed = _opened(~_opened(~np.pad(faint, ((0, 0), (gap, gap))), 2 * gap + 1), 1)[:, gap:-gap] | faint
    runs = _opened(closed, round(0.7 * stroke) | 1)
    labels, _ = ndimage.label(runs, np.ones((3, 3)))
    rules = np.zeros_like(faint)
    sides = np.array([(f.rows.start, f.rows.stop, f.columns.start, f.columns.stop) for f in frames]).reshape(-1, 4)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        length = columns.stop - columns.start
        if length < shortest and not _crosses(rows, columns, sides):
            continue
        for track in _tracks(labels[rows, columns] == number):
            counts = track.sum(0)
            # Strokes may lie along the line: it is where it is thin.
            thickness = float(np.percentile(counts[counts > 0], 25))
            if thickness > THICKEST_RULE * stroke or length < 5 * thickness:
                continue
            middle = (track * np.arange(len(track))[:, None]).sum(0) / np.maximum(counts, 1)
            known = np.flatnonzero((counts > 0) & (counts <= 1.3 * thickness + 1))
            middle = np.interp(np.arange(length), known, middle[known])
            middle = ndimage.median_filter(middle, min(length, round(2 * stroke)), mode="nearest")
            reach = int(thickness / 2 + 1.5)
            for offset in range(-reach, reach + 1):
                y = np.rint(middle).astype(int) + offset + rows.start
                valid = (y >= 0) & (y < len(rules))
                rules[y[valid], np.arange(columns.start, columns.stop)[valid]] = True
    return rules & ndimage.binary_dilation(faint)


def _sides(coverage: Float[np.ndarray, " n"]) -> tuple[int, int]:
    """Where two opposite sides of a frame are, from the share of ink across each place; (0, 0) if they are not drawn.

    Dirt may stick out of a frame: its sides are near the ends of its bounding box, not on them.
    """
    drawn = np.flatnonzero(coverage > 0.85)
    if not len(drawn) or drawn[0] >= 0.25 * len(coverage) or drawn[-1] < 0.75 * len(coverage):
        return 0, 0
    return int(drawn[0]), int(drawn[-1]) + 1


def _tracks(part: Mask) -> list[Mask]:
    """The lines of a connected component: itself, or the several that a stroke joins, one above the other."""
    starts = part & ~np.pad(part, ((1, 0), (0, 0)))[:-1]
    crossed = starts.sum(axis=0)  # lines at each column
    usual = int(np.bincount(crossed[crossed > 0]).argmax())
    if usual == 1:
        return [part]
    order = np.where(part & (crossed == usual), starts.cumsum(axis=0), 0)
    return [order == track for track in range(1, usual + 1)]


def _crosses(rows: slice, columns: slice, sides: Int[np.ndarray, "frames 4"]) -> bool:
    """Whether a line runs from the left side of a frame to the right one; a 1 in a box touches one at most.

    Frames are [top, bottom, left, right].
    """
    top, bottom, left, right = sides.T
    reach = 0.08 * np.minimum(bottom - top, right - left) + 1
    across = (top - reach <= rows.start) & (rows.stop <= bottom + reach)
    return bool((across & (columns.start <= left + reach) & (columns.stop >= right - reach)).any())


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
    framed = {tuple(part.start for part in frame.box) for frame in _frames(mask, max(6.0, 0.02 * max(mask.shape)))}
    possible &= [(box[0].start, box[1].start) not in framed for box in boxes]
    if not possible.any():
        return 0.7 * float(np.median(size[:, 0]))
    heights = np.sort(size[possible, 0])
    weights = np.cumsum(heights.astype(np.float64) ** 2)
    return float(heights[np.searchsorted(weights, weights[-1] / 2)])
