import numpy as np
import pytest

from mnist_flax.ocr import annotate, page_reader


@pytest.mark.parametrize("left", [0.0, 74.0])
def test_an_answer_at_the_edge_is_there_whole(left):
    def ink_above(left: float) -> int:
        digit = page_reader.Digit("?", 1, 0.5, (0.1,) * 10, (left, 30.0, left + 6, 60.0), np.zeros((28, 28), np.uint8))
        found = page_reader.Reading(((page_reader.Number((digit,)),),))
        copy = np.asarray(annotate.annotate(np.ones((80, 80), np.float32), found)).astype(int)
        return int((255 - copy[:28]).sum())

    assert ink_above(left) == pytest.approx(ink_above(37.0), rel=0.05)
