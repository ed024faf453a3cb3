"""Reading order: marks into lines, digits into numbers."""

import itertools

import numpy as np
from jaxtyping import Bool, Float

from mnist_flax.ocr.segment import FRAGMENT, Box, Marks

Pairs = Float[np.ndarray, " pairs"]  # a number for each two neighbours of a line

SAME_LINE = 0.6  # digit heights between the middles of neighbours in a line
NUMBER_GAP = 0.6  # digit heights between two numbers, where digits are written close
BOX_GAP = 0.35  # digit heights between the boxes of two numbers, more than between those of one
WIDE_PITCH, WIDEST_PITCH = 1.25, 1.6  # times the usual pitch of digits in boxes: where numbers may, and must, end


def find_lines(marks: Marks) -> list[list[int]]:
    """Numbers of the marks of each line, from top to bottom.

    A mark joins the line whose latest marks, going right, are at its height: lines may slope and bend.
    """
    anchors = {n: box for n, box in marks.boxes.items() if box[3] - box[1] >= FRAGMENT * marks.height}
    rest = [n for n in marks.boxes if n not in anchors]
    lines: list[list[int]] = []
    level: list[float] = []
    for number in sorted(anchors, key=lambda n: anchors[n][0]):
        middle = _middle(anchors[number])
        nearest = min(range(len(lines)), key=lambda i: abs(level[i] - middle), default=None)
        if nearest is None or abs(level[nearest] - middle) > SAME_LINE * marks.height:
            lines.append([number])
            level.append(middle)
        else:
            lines[nearest].append(number)
            level[nearest] += 0.4 * (middle - level[nearest])
    for number in rest:  # low marks, such as a wide 2: with the line that they lie in
        middle = _middle(marks.boxes[number])
        heights = [np.median([_middle(marks.boxes[n]) for n in line]) for line in lines]
        nearest = min(range(len(lines)), key=lambda i: abs(heights[i] - middle), default=None)
        if nearest is not None and abs(heights[nearest] - middle) < SAME_LINE * marks.height:
            lines[nearest].append(number)
    return sorted(lines, key=lambda line: np.median([_middle(marks.boxes[n]) for n in line]))


def _middle(box: Box) -> float:
    return (box[1] + box[3]) / 2


def number_breaks(
    lines: list[list[Box]], height: float, separators: Bool[np.ndarray, "rows columns"]
) -> list[list[bool]]:
    """Whether a new number begins between each digit of a line and the next, for all lines of a page.

    What ends a number depends on the paper, `separators` being its vertical rules:

    - Where rules run through digits, as on squared paper, they say nothing: a wide gap ends a number.
    - Where most neighbours are parted by rules, digits have boxes of their own: the boxes say it.
    - Elsewhere a wide gap does, or a rule.
    """
    pairs = [list(itertools.pairwise(line)) for line in lines]
    every = [pair for line in pairs for pair in line]
    if not every:
        return [[] for _ in lines]
    pitch = np.array([(b[0] + b[2] - a[0] - a[2]) / 2 for a, b in every])
    breaks = _breaks_at_gaps(np.array([b[0] - a[2] for a, b in every]) / height, pitch)
    if np.mean([_is_crossed(box, separators) for line in lines for box in line]) < 0.25:
        rules = [_rules_between(a, b, height, separators) for a, b in every]
        parted = np.array([bool(found) for found in rules])
        spans = np.array([found[-1] - found[0] if found else 0.0 for found in rules]) / height
        breaks = _breaks_at_boxes(parted, spans, pitch) if parted.mean() > 0.5 else breaks | parted
    result = iter(breaks.tolist())
    return [[next(result) for _ in line] for line in pairs]


def _breaks_at_gaps(gaps: Pairs, pitch: Pairs) -> Bool[np.ndarray, " pairs"]:
    """Numbers end at wide gaps, in digit heights; an even pitch is that of boxes that were too pale to be seen."""
    usual = float(np.median(gaps))
    if usual < NUMBER_GAP:
        return gaps > max(NUMBER_GAP, 2.0 * usual)
    return pitch > WIDE_PITCH * np.percentile(pitch, 25) if _is_even(pitch) else gaps > NUMBER_GAP


def _breaks_at_boxes(parted: Bool[np.ndarray, " pairs"], spans: Pairs, pitch: Pairs) -> Bool[np.ndarray, " pairs"]:
    """Numbers end where two rules are further apart than usual and so are the digits, or the digits much further.

    `spans` are from the first to the last rule between neighbours, in digit heights, where rules part them.
    """
    within = parted & (spans <= np.percentile(spans[parted], 20))
    relative = pitch / np.median(pitch[within])
    apart = spans > spans[within].max() + BOX_GAP
    return (apart & (relative > WIDE_PITCH)) | (relative > WIDEST_PITCH)


def _is_even(pitch: Pairs) -> bool:
    """Whether most neighbours are equally far apart."""
    near = pitch[pitch < WIDE_PITCH * np.percentile(pitch, 25)]
    return len(near) > 0.4 * len(pitch) and bool(near.std() < 0.08 * near.mean())


def _is_crossed(box: Box, separators: Bool[np.ndarray, "rows columns"]) -> bool:
    """Whether a vertical rule runs through the middle of a digit."""
    left, top, right, bottom = box
    quarter = (right - left) // 4
    middle = separators[max(0, top) : bottom, max(0, left + quarter) : right - quarter]
    return bool(middle.size) and bool(middle.any(1).mean() > 0.5)


def _rules_between(a: Box, b: Box, height: float, separators: Bool[np.ndarray, "rows columns"]) -> list[float]:
    """Columns of the vertical rules that pass between two digits, from left to right.

    A rule reaches beyond the digits, above and below; what does not is a stroke that was taken for one.
    """
    beyond = round(0.1 * height)
    top, bottom = max(0, min(a[1], b[1]) - beyond), max(a[3], b[3]) + beyond
    left, right = sorted((max(0, (a[0] + a[2]) // 2), max(0, (b[0] + b[2]) // 2)))
    between = separators[top:bottom, left:right]
    if not between.size or between.any(1).mean() <= 0.75:
        return []
    inked = np.flatnonzero(between.any(0))
    return [float(run.mean()) for run in np.split(inked, np.flatnonzero(np.diff(inked) > 1) + 1)]
