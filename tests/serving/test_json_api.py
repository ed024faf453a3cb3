import json

import numpy as np
import pytest

from mnist_flax.inference import classifier, mistakes
from mnist_flax.inference.run import load_run
from mnist_flax.runtime.cli import UserError
from mnist_flax.serving import json_api, schema


def test_the_doubtful_are_counted_over_all_mistakes_listed_or_not(digits_run, monkeypatch):
    monkeypatch.setattr(schema, "MOST_MISTAKES", 1)
    undecided = classifier.CalibratedClassifier(
        load_run(digits_run), lambda images: np.full((len(images), 10), -2.3), 1.0, 0.5
    )
    found = json_api.mistakes_to_json(mistakes.find_mistakes(undecided), 0.5)
    assert found["doubtful"] == found["errors"] > len(found["mistakes"]) == 1


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 10**400, -1, 256, [1]], ids=ascii)
def test_a_pixel_is_a_whole_number(value):
    pixels = [[0] * 28 for _ in range(28)]
    pixels[3][4] = value
    with pytest.raises(UserError, match=r"`\$\.pixels\[3\]\[4\]`"):
        json_api.parse_digit(json.dumps({"pixels": pixels}).encode())


@pytest.mark.parametrize("point", [[True, 0], ["0", 0], [0], [0, 0, 0], [None, 0], [10**400, 0], 0, {}], ids=ascii)
def test_a_point_is_two_numbers(point):
    with pytest.raises(UserError, match=r"`\$\.strokes\[0\]\[1\]"):
        json_api.parse_digit(json.dumps({"strokes": [[[0, 0], point]]}).encode())
