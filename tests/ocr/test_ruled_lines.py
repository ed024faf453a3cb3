import numpy as np
import pytest

from mnist_flax.ocr import binarize, ruled_lines


@pytest.mark.parametrize("degrees", [-3.0, 0.0, 2.0])
def test_the_tilt_is_found(degrees):
    rows, columns = np.mgrid[:300, :500]
    mask = (np.rint(rows - columns * np.tan(np.deg2rad(degrees))) % 60 < 8) & (columns % 30 < 12)
    assert ruled_lines.tilt(mask) == pytest.approx(degrees, abs=0.2)


def test_rules_go_and_strokes_that_cross_them_stay():
    share = np.zeros((120, 400), np.float32)
    share[60:62] = share[:, 200:202] = 1
    share[30:90, 100:108] = share[30:90, 300:308] = 1
    found, vertical = ruled_lines.remove_rules(binarize.Ink(share, share > 0, share > 0), 60)
    assert not found.mask[:, 120:290].any() and vertical[:, 200:202].all()
    assert found.mask[30:90, 100:108].all() and found.mask[30:90, 300:308].all()


def test_rules_that_a_stroke_joins_go_too():
    share = np.zeros((400, 120), np.float32)
    share[:, 40:42] = share[:, 64:66] = 1
    rows = np.arange(200, 240)
    for row in rows:  # a stem from one to the other
        share[row, 64 - (row - 200) * 24 // 40 - 3 : 64 - (row - 200) * 24 // 40 + 4] = 1
    found, vertical = ruled_lines.remove_rules(binarize.Ink(share, share > 0, share > 0), 40)
    assert vertical[:, 40:42].mean() > 0.95 and vertical[:, 64:66].mean() > 0.95
    assert found.mask[205:235].any() and not found.mask[:190].any()
