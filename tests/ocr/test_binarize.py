import numpy as np

from mnist_flax.ocr import binarize


def test_shadows_do_not_matter():
    grey = np.full((200, 300), 0.9, np.float32)
    grey[60:140, 100:110] = grey[60:140, 180:190] = 0.2
    lit = binarize.find_ink(grey).mask
    shaded = binarize.find_ink(grey * np.linspace(1, 0.35, 300, dtype=np.float32)).mask
    inverted = binarize.find_ink(1 - grey).mask
    assert lit[60:140, 100:110].mean() > 0.95 and lit.sum() < 2_200
    assert np.mean(lit != shaded) < 0.01 and np.mean(lit != inverted) < 0.01
