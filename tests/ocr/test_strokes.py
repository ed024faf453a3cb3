import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.ocr import strokes as drawing
from tests import strokes

coordinate = st.floats(0, 1, allow_subnormal=False)
drawings = st.lists(st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=30), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(drawings)
def test_any_drawing_is_in_mnists_form(strokes):
    image = drawing.render(strokes).astype(np.float64)
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20 and image.max() > 200
    for axis in (0, 1):
        centre = image.sum(axis) @ np.arange(28) / image.sum()
        touches_edge = (rows, columns)[1 - axis][[0, -1]]
        assert abs(centre - 14) <= 0.6 or 0 in touches_edge or 27 in touches_edge


@pytest.mark.parametrize("digit", range(10))
def test_place_and_size_do_not_matter(digit):
    whole = drawing.render(strokes.DIGITS[digit]).astype(int)
    small = [[(0.1 + 0.4 * x, 0.5 + 0.4 * y) for x, y in stroke] for stroke in strokes.DIGITS[digit]]
    assert np.abs(drawing.render(small).astype(int) - whole).max() <= 8  # of 255, by rounding


def test_the_pen_is_as_wide_as_mnists():
    image = drawing.render([[(0.5, 0.1), (0.5, 0.9)]]) / 255  # a straight stroke: ink over length
    assert image.sum() / 20 == pytest.approx(drawing.PEN, rel=0.1)


def test_a_dot_is_a_dot():
    shaky = [[(0.5, 0.5), (0.505, 0.5), (0.5, 0.508)]]
    image = drawing.render(shaky)
    assert (image > 128).sum() > 200  # a blob, not the tremor made large
    np.testing.assert_array_equal(drawing.render([]), 0)
