"""Reading order: marks into lines, digits into numbers."""

import itertools

import numpy as np
from jaxtyping import Bool

from mnist_flax.segment import FRAGMENT, Box, Marks

SAME_LINE = 0.6  # digit heights between the middles of neighbours in a line
NUMBER_GAP = 0.6  # digit heights between two numbers, where digits are written close


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


def number_breaks(boxes: list[Box], height: float, separators: Bool[np.ndarray, "rows columns"]) -> list[bool]:
    """Whether a new number begins between each digit of a line and the next.

    Digits in boxes of their own stand at an even pitch within a number; where few digits are parted by printed
    lines (`separators`, vertical rules), such a line ends a number; otherwise a wide gap does.
    """
    if len(boxes) < 2:
        return []
    pairs = list(itertools.pairwise(boxes))
    gaps = np.array([b[0] - a[2] for a, b in pairs]) / height
    parted = np.array([_parted(a, b, separators) for a, b in pairs])
    if parted.mean() > 0.5:
        pitch = np.array([(b[0] + b[2] - a[0] - a[2]) / 2 for a, b in pairs])
        usual = np.median(pitch[parted])
        return list(pitch > 1.4 * usual) if len(pitch) > 1 else list(gaps > 1.4)
    wide = max(NUMBER_GAP, 2.0 * float(np.median(gaps))) if np.median(gaps) < NUMBER_GAP else NUMBER_GAP
    return list((gaps > wide) | parted)


def _parted(a: Box, b: Box, separators: Bool[np.ndarray, "rows columns"]) -> bool:
    """Whether a vertical rule passes between two digits."""
    top, bottom = max(a[1], b[1]), min(a[3], b[3])
    left, right = sorted(((a[0] + a[2]) // 2, (b[0] + b[2]) // 2))
    between = separators[top:bottom, left:right]
    return bool(between.size) and bool(between.any(0).any()) and bool(between.any(1).mean() > 0.5)
