"""The figure of augmentations: its rows are the kinds that a recipe has on."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments import augmentations
from tests.commands import command

IMAGES = np.zeros((3, 28, 28), np.float32)
IMAGES[:, 6:22, 12:16] = 1


def test_rows_are_the_kinds_that_are_on():
    fields = {"rotation": 30.0, "elastic_sigma": 4.0, "tone": 0.5, "probability": 0.5, "final_scale": 0.3}
    found = augmentations.rows(IMAGES, fields, seed=0)
    assert [name.strip() for name in found] == ["as it is", "moved", "tone", *["in training"] * 3]
    np.testing.assert_array_equal(found["as it is"], IMAGES)
    assert (found["moved"] != IMAGES).any((1, 2)).all() and (found["moved"][:, 0, 0] == 0).all()
    assert (found["tone"][:, 0, 0] > 0).all()  # every example, whatever the probability
    figure = augmentations.figure_augmentations(found)
    assert len(figure.axes) == 6 * 3
    FigureCanvasAgg(figure).draw()


def test_nothing_on_is_only_the_images():
    found = augmentations.rows(IMAGES, {"elastic_sigma": 4.0, "probability": 0.2}, seed=0)
    assert [name.strip() for name in found] == ["as it is", *["in training"] * 3]
    assert all((row == IMAGES).all() for row in found.values())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--figure=no/such/place.png", "must be a .png file in a directory that exists"),
        ("--figure=figure.gif", "must be a .png file"),
        ("--config.augment.tone=2.0", "out of range: use a number from 0.0 to 1.0"),
        ("--config.augment.tones=0.5", "Did you mean"),
        ("--config.augment.final_epochs=99.0", "longer than the run"),
        ("record", "is no flag"),
    ],
)
def test_wrong_inputs_get_one_line(argument, message):
    ended = command("experiments.augmentations", argument, status=2)
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1
