import numpy as np

from mnist_flax.ocr import reading_order, segment


def comb(left: int, count: int) -> tuple[list[segment.Box], list[int]]:
    """Digits in boxes 60 wide from `left` on, and the rules around them."""
    return [(left + 60 * i + 10, 10, left + 60 * i + 45, 50) for i in range(count)], [
        left + 60 * i for i in range(count + 1)
    ]


def test_numbers_in_boxes_end_where_boxes_do():
    separators = np.zeros((60, 1000), bool)
    first, second, third = comb(10, 3), comb(230, 1), comb(330, 2)
    for _, columns in (first, second, third):
        separators[5:55, columns] = True
    boxes = first[0] + second[0] + third[0]
    assert reading_order.number_breaks([boxes], 40, separators) == [[False, False, True, True, False]]


def test_numbers_on_plain_paper_end_at_wide_gaps():
    boxes = [(left, 0, left + 25, 40) for left in (0, 32, 64, 130, 162)]
    assert reading_order.number_breaks([boxes, boxes[:1], []], 40, np.zeros((60, 400), bool)) == [
        [False, False, True, False],
        [],
        [],
    ]
