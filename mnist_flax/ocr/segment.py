"""Finding digits in ink: marks, what may be one digit, and where touching digits may be cut.

What is doubtful is not decided here: a line of marks becomes a lattice of spans, each of which may be a digit, and
the classifier chooses the path (LeCun et al. 1998, section V: heuristic over-segmentation).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mnist_flax.data.mnist_format import mnist_form
from mnist_flax.ocr.binarize import EDGE, Ink, Mask, level

# In heights of a digit, unless said otherwise
SPECK = 0.22  # marks smaller than this in both directions are dirt
FRAGMENT = 0.5  # a mark that is lower than this is part of a digit
NEAR = 0.25  # distance from its digit to a fragment
TALLEST, WIDEST = 2.2, 1.5  # of one digit
JOINED = 0.8  # a mark that is wider than this may be several digits
APART = 0.1  # parts of one digit are no further apart
MOST_CUTS = 5  # of one mark
MOST_PARTS = 4  # of one digit
MOST_CROSSED = 2.2  # strokes that a cut may cross

# What a reading of a line costs, in nats; found on training digits, single and touching.
DOUBT = 6.0  # a nat of the classifier's
CUT, JOIN = 0.25, 2.0  # a stroke that is cut, a mark that is joined to another
WIDE, LOW = 12.0, 8.0  # the square of a height too wide, a height too low

Labels = Int[np.ndarray, "height width"]
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two just outside


class Span(NamedTuple):
    """Neighbouring atoms of a line that may be one digit."""

    first: int
    stop: int
    box: Box
    image: UInt8[np.ndarray, "28 28"]
    cut: float  # strokes that are cut at its two ends
    marks: int  # that it joins


class Marks(NamedTuple):
    """Marks of ink, by number from 1."""

    labels: Labels  # 0 is paper
    boxes: dict[int, Box]
    height: float  # of a digit, pixels


def find_marks(ink: Ink, height: float) -> Marks:
    """Connected ink without dirt, with fragments counted to their digit and joined digits cut into atoms."""
    from scipy import ndimage

    labels, count = ndimage.label(ink.mask, np.ones((3, 3)))
    boxes = _boxes(labels)
    area = np.bincount(labels.ravel(), minlength=count + 1)
    stroke = stroke_width(ink.mask)
    keep = np.zeros(count + 1, bool)
    for number, (left, top, right, bottom) in boxes.items():
        wide, high = right - left, bottom - top
        speck = max(wide, high) < SPECK * height or area[number] < 1.3 * stroke**2
        shadow = high > TALLEST * height or (wide > 1.2 * height and high < 0.2 * height)
        keep[number] = not (speck or shadow)
    labels = np.where(keep[labels], labels, 0)
    boxes = {number: box for number, box in boxes.items() if keep[number]}
    labels = _attach_fragments(labels, boxes, height)
    return Marks(labels, _boxes(labels), height)


def stroke_width(mask: Mask) -> float:
    """Pixels across a typical stroke: area over half the length of its edge."""
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    edge = mask.sum() - inner.sum()
    return max(1.0, 2.0 * float(mask.sum()) / max(1.0, float(edge)) - 1)


def _boxes(labels: Labels) -> dict[int, Box]:
    from scipy import ndimage

    found = enumerate(ndimage.find_objects(labels), start=1)
    return {i: (part[1].start, part[0].start, part[1].stop, part[0].stop) for i, part in found if part is not None}


def _attach_fragments(labels: Labels, boxes: dict[int, Box], height: float) -> Labels:
    """Gives each fragment the number of the nearest digit; one that has none near stays, unless it is tiny."""
    from scipy import ndimage

    reach = int(np.ceil(NEAR * height)) + 1
    fragments = [n for n, box in boxes.items() if box[3] - box[1] < FRAGMENT * height]
    whole = np.zeros(labels.max(initial=0) + 1, bool)
    whole[list(boxes.keys() - set(fragments))] = True
    renumber = np.arange(len(whole))
    for number in fragments:
        left, top, right, bottom = boxes[number]
        window = (slice(max(0, top - reach), bottom + reach), slice(max(0, left - reach), right + reach))
        part = labels[window]
        others = whole[part]
        if others.any():
            distance, nearest = ndimage.distance_transform_edt(~others, return_indices=True)
            mine = part == number
            place = np.unravel_index(np.argmin(np.where(mine, distance, np.inf)), part.shape)
            owner = int(part[tuple(axis[place] for axis in nearest)])
            l2, t2, r2, b2 = boxes[owner]
            fits = max(right, r2) - min(left, l2) < WIDEST * height and max(bottom, b2) - min(top, t2) < 1.6 * height
            if distance[place] <= NEAR * height and fits:
                renumber[number] = owner
                continue
        if max(right - left, bottom - top) < 0.35 * height:
            renumber[number] = 0
    return renumber[labels]


def spans_of_line(ink: Ink, marks: Marks, line: list[int]) -> list[Span]:
    """The lattice of one line, from the numbers of its marks.

    Atoms are marks, or parts of joined ones, from left to right. Every path from 0 to the number of atoms reads the
    whole line.
    """
    stroke = stroke_width(ink.mask)
    atoms: list[tuple[Labels, Box, int]] = []  # mask in its box, box, mark
    cut_costs: dict[int, float] = {}  # of the cut before an atom
    for number in sorted(line, key=lambda n: marks.boxes[n][0] + marks.boxes[n][2]):
        box = marks.boxes[number]
        mask = marks.labels[box[1] : box[3], box[0] : box[2]] == number
        cuts = find_cuts(mask, marks.height, stroke) if box[2] - box[0] > JOINED * marks.height else []
        for i, part in enumerate(_parts(mask, [seam for seam, _ in cuts])):
            if part.any():
                if i:
                    cut_costs[len(atoms)] = cuts[i - 1][1]
                atoms.append((*_trim(part, box), number))
    spans = []
    for first in range(len(atoms)):
        for stop in range(first + 1, min(len(atoms), first + MOST_PARTS + MOST_CUTS) + 1):
            group = atoms[first:stop]
            box, numbers = _union([atom[1] for atom in group]), {atom[2] for atom in group}
            if stop > first + 1:
                joined = group[-2][2] != group[-1][2]
                if joined and group[-1][1][0] - max(atom[1][2] for atom in group[:-1]) > APART * marks.height:
                    break
                alone = len(numbers) == 1 and _is_alone(atoms, first, stop)
                if box[2] - box[0] > WIDEST * marks.height and not alone:
                    break
            cut = sum(cut_costs.get(edge, 0.0) for edge in (first, stop))
            spans.append(Span(first, stop, box, _form(ink, group, box), cut, len(numbers)))
    return spans


def whole(ink: Ink, marks: Marks) -> list[Span]:
    """All marks as one digit."""
    atoms = [
        (marks.labels[box[1] : box[3], box[0] : box[2]] == number, box, number) for number, box in marks.boxes.items()
    ]
    box = _union([atom[1] for atom in atoms])
    return [Span(0, 1, box, _form(ink, atoms, box), 0.0, 1)]


def _is_alone(atoms: list, first: int, stop: int) -> bool:
    """Whether the mark of these atoms has no others beside them."""
    mark = atoms[first][2]
    return (first == 0 or atoms[first - 1][2] != mark) and (stop == len(atoms) or atoms[stop][2] != mark)


def find_cuts(
    mask: Bool[np.ndarray, "rows columns"], height: float, stroke: float
) -> list[tuple[Int[np.ndarray, " rows"], float]]:
    """Where joined digits may be cut: paths from top to bottom that cross little ink.

    Returns:
      From left to right, for each path the column at which it passes each row, and its cost: the number of
      strokes that it cuts.
    """
    margin, reach = 0.15 * height, max(2, round(0.2 * height))
    middles = np.arange(margin, mask.shape[1] - margin, 0.08 * height).astype(int)
    seams = _seams(mask, middles, reach)
    every = np.arange(len(mask))
    along = mask[every, seams]  # [paths, rows]
    crossed = along.sum(axis=1)
    strokes = np.maximum(crossed / stroke, (along[:, 1:] & ~along[:, :-1]).sum(axis=1) + along[:, 0])
    before = np.pad(mask.cumsum(axis=1), ((0, 0), (1, 0)))
    sides = before[every, seams], before[:, -1] - before[every, seams]  # ink of each row left and right of a path
    # On either side there is ink for a digit: at least a straight stroke of half the height.
    possible = crossed <= MOST_CROSSED * stroke + 1
    for side in sides:
        possible &= (side.sum(axis=1) > 0.5 * stroke * height) & ((side > 0).sum(axis=1) > 0.5 * height)
    chosen: list[int] = []
    for i in np.flatnonzero(possible)[np.argsort(strokes[possible], kind="stable")]:
        new = all(np.abs(seams[i] - seams[other]).mean() > 0.1 * height for other in chosen)
        if new and len(chosen) < MOST_CUTS:
            chosen.append(int(i))
    return sorted(((seams[i], float(strokes[i])) for i in chosen), key=lambda cut: cut[0].mean())


def _seams(
    mask: Bool[np.ndarray, "rows columns"], middles: Int[np.ndarray, " seams"], reach: int
) -> Int[np.ndarray, "seams rows"]:
    """For each of `middles` the path from top to bottom that crosses least ink, within `reach` columns of it.

    A path moves at most a column aside a row (seam carving: Avidan and Shamir 2007).
    """
    rows, columns = mask.shape
    crooked, aside = 0.05, 0.02  # paths that cross as little ink are told apart by these
    offsets = np.arange(-reach, reach + 1)
    across = np.clip(middles[:, None] + offsets, 0, columns - 1)
    outside = (middles[:, None] + offsets != across) * float(rows)
    cost = mask[:, across] + outside + aside * np.abs(offsets) / reach  # [rows, seams, offsets]
    total = np.empty(cost.shape)
    total[0] = cost[0]
    padded = np.full((len(middles), len(offsets) + 2), np.inf)
    for y in range(1, rows):
        padded[:, 1:-1] = total[y - 1]
        total[y] = cost[y] + np.minimum(total[y - 1], np.minimum(padded[:, :-2], padded[:, 2:]) + crooked)
    every, seams = np.arange(len(middles)), np.empty((len(middles), rows), np.int64)
    place = total[-1].argmin(axis=1)
    seams[:, -1] = across[every, place]
    for y in range(rows - 2, -1, -1):
        near = np.clip(place[:, None] + [0, -1, 1], 0, len(offsets) - 1)
        place = near[every, (total[y][every[:, None], near] + [0, crooked, crooked]).argmin(axis=1)]
        seams[:, y] = across[every, place]
    return seams


def _parts(mask, seams) -> list[np.ndarray]:
    """The mask between seams, from left to right."""
    across = np.arange(mask.shape[1])[None]
    edges = [np.zeros(len(mask), int), *seams, np.full(len(mask), mask.shape[1])]
    ordered = np.maximum.accumulate(np.stack(edges), axis=0)
    return [mask & (across >= left[:, None]) & (across < right[:, None]) for left, right in itertools.pairwise(ordered)]


def _trim(mask, box: Box) -> tuple[np.ndarray, Box]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return mask[top:bottom, left:right], (box[0] + left, box[1] + top, box[0] + right, box[1] + bottom)


def _union(boxes: list[Box]) -> Box:
    low, high = np.min(boxes, axis=0), np.max(boxes, axis=0)
    return int(low[0]), int(low[1]), int(high[2]), int(high[3])


def _form(ink: Ink, atoms: list, box: Box) -> UInt8[np.ndarray, "28 28"]:
    """MNIST's form of some atoms, with the soft edges that are theirs."""
    from scipy import ndimage

    left, top, right, bottom = box
    mask = np.zeros((bottom - top + 2, right - left + 2), bool)  # a pixel around for soft edges
    for part, (x, y, _, _), _ in atoms:
        mask[y - top + 1 :, x - left + 1 :][: part.shape[0], : part.shape[1]] |= part
    share = np.zeros(mask.shape, np.float32)
    y0, x0 = max(0, top - 1), max(0, left - 1)
    crop = ink.share[y0 : bottom + 1, x0 : right + 1]
    share[y0 - top + 1 :, x0 - left + 1 :][: crop.shape[0], : crop.shape[1]] = crop
    foreign = (share >= EDGE) & ~mask
    return mnist_form(level(share) * ndimage.binary_dilation(mask) * ~foreign)


def penalty(span: Span, height: float) -> float:
    """Nats that speak against a span's being one digit, whatever the classifier says: its shape, cuts and joins.

    Digits are seldom wider than high or much lower than their neighbours.
    """
    left, top, right, bottom = span.box
    wide, high = (right - left) / height, (bottom - top) / height
    shape = WIDE * max(0.0, wide / max(high, 0.8) - 1.0) ** 2 + LOW * max(0.0, 0.7 - high)
    return CUT * span.cut / 2 + JOIN * (span.marks - 1) + shape


def best_path(spans: Sequence[Span], log_probabilities: Float[np.ndarray, " spans"], height: float) -> list[int]:
    """Indices of the spans that read a line best (Viterbi): least doubt of the classifier, least `penalty`.

    `log_probabilities` are of each span's likeliest digit, and `height` is of a digit.
    """
    stop = max((span.stop for span in spans), default=0)
    best = [(0.0, -1)] + [(np.inf, -1)] * stop
    for index in sorted(range(len(spans)), key=lambda i: spans[i].first):
        span = spans[index]
        cost = best[span.first][0] - DOUBT * float(log_probabilities[index]) + penalty(span, height)
        if cost < best[span.stop][0]:
            best[span.stop] = (cost, index)
    path: list[int] = []
    while stop > 0:
        path.append(best[stop][1])
        stop = spans[path[-1]].first
    return path[::-1]
