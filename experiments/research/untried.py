"""Which points of a space no trial has had: choices and integers have finitely many, and the same point twice is waste.

A point is drawn range by range. A branch, all points that begin with the same values, is closed once each was tried.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mnist_flax.experiments.research.space import Dimension, Space

Point = Mapping[str, Any]  # values as a config has them, by range


def next_range(space: Space, point: Point) -> str | None:
    """The first range that applies to a point and that it has no value of yet."""
    return next((key for key, dimension in space.items() if key not in point and dimension.applies(point)), None)


def size(space: Space, point: Point) -> float:
    """How many points begin with the values of this one: infinity if a range of real numbers is among the others."""
    key = next_range(space, point)
    if key is None:
        return 1
    if math.isinf(space[key].count):
        return math.inf
    conditions = [dimension.condition for dimension in space.values() if dimension.condition]
    deciding = {value for parent, values in conditions if parent == key for value in values}
    total = sum(size(space, {**point, key: value}) for value in deciding)
    if others := space[key].count - len(deciding):
        total += others * size(space, {**point, key: object()})  # a value that nothing depends on
    return total


def draw(space: Space, given: Point, propose: Callable[[str], Any], tried: Sequence[Point]) -> dict[str, Any]:
    """The proposed point, or one near it that was not tried; what is `given` of it stays."""
    point: dict[str, Any] = {}
    while (key := next_range(space, point)) is not None:
        point[key] = given[key] if key in given else _nearest_open(space, point, key, propose(key), tried)
    return point


def _nearest_open(space: Space, point: Point, key: str, value: Any, tried: Sequence[Point]) -> Any:
    """The value nearest to this one, in the order of its range, whose branch is not closed."""
    taken = Counter(other[key] for other in tried if key in other and point.items() <= other.items())

    def is_open(candidate: Any) -> bool:
        return taken[candidate] < size(space, {**point, key: candidate})

    if is_open(value):
        return value
    values = _values(space[key])
    place = values.index(value)
    by_distance = (values[i] for d in range(1, len(values)) for i in (place - d, place + d) if 0 <= i < len(values))
    return next(filter(is_open, by_distance), value)


def _values(dimension: Dimension) -> Sequence[Any]:
    return dimension.values or range(int(dimension.low), int(dimension.high) + 1)
