import numpy as np
import pytest
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.data.mnist_format import mnist_form
from mnist_flax.runtime import config as config_lib


def test_it_is_what_mnist_is(mnist_data_dir):
    """Real digits, enlarged and brought back, are themselves again; MNIST's own box and centre are kept."""
    config = config_lib.default_config()
    config.data_dir = str(mnist_data_dir)
    digits = datasets.load(config).validation.images[:300]
    differences = []
    for digit in digits:
        large = np.asarray(Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC), np.float32) / 255
        form = mnist_form(large)
        differences.append(np.abs(form.astype(float) - digit).mean() / digit.mean())
        for image in (form.astype(float), digit.astype(float)):
            rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
            assert max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
            for axis in (0, 1):
                assert abs(image.sum(axis) @ np.arange(28) / image.sum() - 14) < 1.1
    assert np.median(differences) < 0.25  # of the ink: the box is set anew, so edges move by parts of a pixel
    forms = np.array([mnist_form(np.kron(digit, np.ones((5, 5))) / 255) for digit in digits])
    assert forms.mean() == pytest.approx(digits.mean(), rel=0.1)  # neither bolder nor finer
    assert (forms > 0).mean() == pytest.approx((digits > 0).mean(), rel=0.15)


@pytest.mark.parametrize("shape", [(3, 3), (20, 20), (200, 40), (40, 200), (1, 500)])
def test_any_size_fits_the_box(shape):
    form = mnist_form(np.pad(np.ones(shape, np.float32), 7))
    rows, columns = np.flatnonzero(form.any(1)), np.flatnonzero(form.any(0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert np.ptp(rows) < 20 and np.ptp(columns) < 20
    wide = shape[1] / shape[0]
    assert (np.ptp(columns) + 1) / (np.ptp(rows) + 1) == pytest.approx(wide, rel=0.3) or max(wide, 1 / wide) > 20


def test_edges_are_soft_and_paper_is_nothing():
    ring = np.hypot(*np.mgrid[-50:51, -50:51])
    form = mnist_form(((ring > 35) & (ring < 45)).astype(np.float32))
    assert ((form > 30) & (form < 225)).sum() > 40
    assert not mnist_form(np.zeros((9, 9), np.float32)).any()
