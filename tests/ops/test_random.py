"""Random bytes and smooth fields, against SciPy."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from jax import random

from mnist_flax.ops.random import gaussian_matrix, uniform_bytes


@pytest.mark.parametrize("sigma", [0.6, 2.0, 4.0, 9.0])
def test_gaussian_matrix_is_scipys_filter(sigma):
    noise = np.random.default_rng(0).normal(size=(23, 17))
    down, across = gaussian_matrix(23, sigma), gaussian_matrix(17, sigma)
    want = scipy.ndimage.gaussian_filter(noise, sigma, mode="constant", cval=0.0, truncate=12)
    np.testing.assert_allclose(np.asarray(down, np.float64) @ noise @ np.asarray(across, np.float64).T, want, atol=1e-6)


def test_noise_is_uniform_and_independent():
    noise = np.asarray(jax.vmap(lambda key: uniform_bytes(key, (5, 7)))(random.split(random.key(0), 4_000)), np.float64)
    levels = noise.ravel() * 128 + 127.5
    np.testing.assert_array_equal(levels, np.round(levels))
    assert scipy.stats.chisquare(np.bincount(levels.astype(int), minlength=256)).pvalue > 1e-3
    assert noise.var() == pytest.approx(1 / 3, rel=0.01)
    places = np.corrcoef(noise.reshape(4_000, -1).T) - np.eye(35)
    assert np.abs(places).max() < 5 / np.sqrt(4_000)
