import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.experiments import forms
from mnist_flax.runtime import run_dir
from tests.commands import command


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("validation_examples", 0, "has no validation examples: choose another --split"),
        ("dataset", "kmnist", "was trained on kmnist, not on digits"),
    ],
)
def test_runs_that_no_forms_can_be_drawn_for_get_one_line(field, value, message, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    recorded = run_dir.read_json(digits_run / "config.json")
    recorded["config"] |= {field: value, "data_dir": str(tmp_path / "data")}
    run_dir.write_json(tmp_path / "run" / "config.json", recorded)
    error = command("experiments.forms", tmp_path / "run", "--split=validation", status=2).stderr
    assert message in error and "download" not in error


def overlap(a, b) -> float:
    """The common part of two boxes (left, top, right, bottom), as a share of their union."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    area, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (area + other - common)


BOX = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), *[st.integers(0, 6)] * 2, *[st.integers(3, 8)] * 2)


@settings(deadline=None)  # the first call imports SciPy
@given(st.lists(BOX, max_size=4), st.lists(BOX, max_size=4))
def test_boxes_are_matched_as_well_as_they_can_be(true, found):
    """Against every way of matching them; so the order, in which either are given, makes no difference."""
    chosen = forms.matches(*(np.array(boxes).reshape(-1, 4) for boxes in (true, found)))
    pairs = [(i, j) for i, j in enumerate(chosen) if j >= 0]
    assert len(chosen) == len(true) and len({j for _, j in pairs}) == len(pairs)
    assert all(overlap(true[i], found[j]) > 0.4 for i, j in pairs)

    def total(pairs) -> float:
        shares = [overlap(true[i], found[j]) for i, j in pairs if j < len(found)]
        return sum(share for share in shares if share > 0.4)

    places = range(len(found) + len(true))  # those beyond the boxes that were found are none
    best = max(total(enumerate(each)) for each in itertools.permutations(places, len(true)))
    assert total(pairs) == pytest.approx(best)


def test_a_digit_that_was_not_found_takes_no_box_of_another():
    assert forms.matches(np.array([[0, 0, 10, 10], [20, 0, 30, 10]]), np.array([[20, 0, 30, 10]])) == [-1, 0]
