import numpy as np
import pytest

from mnist_flax.experiments.benchmarks import form_generator


def solid_digits() -> form_generator.Digits:
    """A full box of ink for each of the ten labels."""
    images = np.zeros((10, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = 255
    return images, np.arange(10)


@pytest.mark.parametrize("paper", form_generator.PAPERS)
def test_ink_lies_where_the_boxes_say_and_there_is_a_box_for_each_digit(paper):
    for seed in range(4):
        form = form_generator.draw(solid_digits(), np.random.default_rng(seed), paper=paper, inverted=seed == 3)
        assert len(form.lines) == 4 and all(len(line) == 3 for line in form.lines)
        assert all(1 <= len(number) <= 5 and number.isdigit() for line in form.lines for number in line)
        assert len(form.boxes) == sum(len(number) for line in form.lines for number in line)
        grey = (255 - form.image if seed == 3 else form.image) / 255.0
        inside = np.zeros(grey.shape, bool)
        for left, top, right, bottom in form.boxes.astype(int):
            assert 0 <= left < right <= grey.shape[1] and 0 <= top < bottom <= grey.shape[0]
            assert grey[(top + bottom) // 2, (left + right) // 2] < 0.3
            inside[top:bottom, left:right] = True
        if paper == "plain":  # where nothing is printed
            assert grey[~inside].min() > 0.9


def test_boxes_turn_with_the_picture():
    style = form_generator.Style(tilt=5.0)
    for seed in range(3):
        form = form_generator.draw(solid_digits(), np.random.default_rng(seed), style)
        for left, top, right, bottom in form.boxes.astype(int):
            assert form.image[(top + bottom) // 2, (left + right) // 2] < 0.3 * 255


def test_a_form_derives_from_its_generator_alone():
    first, same, other = (
        form_generator.draw(solid_digits(), np.random.default_rng(seed), form_generator.DEGRADED) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.image, same.image)
    assert first.lines == same.lines != other.lines
