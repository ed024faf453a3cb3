import numpy as np
import optax
import pytest

from mnist_flax.data import datasets
from mnist_flax.models.cnn import make_model, scale_pixels
from mnist_flax.runtime.devices import make_mesh
from mnist_flax.training import scoring
from mnist_flax.training.state import hyperparameters, init_state
from tests.training.test_step import EXAMPLES, config_for, random_examples


@pytest.mark.parametrize("batch_size", [7, 80, 1000])
def test_evaluation_counts_every_example_once(batch_size):
    examples, config = random_examples(), config_for(**{"model.batch_norm": True})
    model = make_model(config.model, hyperparameters(config), 10)
    variables = init_state(config, 10, 0).variables()
    mesh = make_mesh()
    scores, logits = scoring.make_evaluate(model, mesh)(variables, *scoring.split_batches(mesh, *examples, batch_size))
    whole = model.apply(variables, scale_pixels(examples[0]))
    np.testing.assert_allclose(np.asarray(logits).reshape(-1, 10)[:EXAMPLES], whole, rtol=1e-4, atol=1e-5)
    expected = optax.softmax_cross_entropy_with_integer_labels(whole, examples[1]).mean()
    assert float(scores["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(scores["accuracy"]) == pytest.approx(np.mean(np.argmax(whole, 1) == examples[1]))
    parts = scoring.make_logits(model, batch_size, mesh)(variables, datasets.Split(*examples))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
