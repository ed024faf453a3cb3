"""The loss, against its formula in NumPy and float64."""

import jax.numpy as jnp
import numpy as np

from mnist_flax.training.loss import cross_entropy


def test_cross_entropy_with_smoothing():
    logits, labels = np.random.default_rng(1).normal(size=(6, 10)), np.arange(6)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = np.eye(10)[labels] * 0.8 + 0.02
    expected = -(targets * log_probabilities).sum(1)
    np.testing.assert_allclose(cross_entropy(jnp.float32(logits), labels, 0.2), expected, rtol=1e-5)
