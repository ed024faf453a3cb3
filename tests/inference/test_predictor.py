import jax
import numpy as np
import pytest

from mnist_flax.inference import predictor
from mnist_flax.inference.run import Run
from mnist_flax.runtime.cli import UserError
from tests.models.test_folded import NETWORKS, model_config, network, random_variables


@pytest.fixture(scope="module")
def trained() -> Run:
    config = model_config(NETWORKS["norms"])
    return Run(None, config, network(config), random_variables(config), tuple("0123456789"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 28, 28), np.uint8)


def test_logits_are_the_linen_models_for_any_number_of_images(trained, images, monkeypatch):
    monkeypatch.setattr(predictor, "BATCH_SIZES", (1, 4, 8))  # whole, padded, and more than the largest
    logits = predictor.make_logits(trained)
    expected = jax.jit(trained.model.apply)(trained.variables, images / np.float32(255))
    for count in (0, 1, 3, 8, 9, 23):
        np.testing.assert_allclose(logits(images[:count]), expected[:count], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits(images / np.float32(255)), expected, rtol=1e-4, atol=1e-4)


def test_features_lead_to_the_logits_without_the_padding(trained, images):
    features = predictor.make_features(trained)(images[:3])
    assert {len(values) for values in features.values()} == {3}
    np.testing.assert_allclose(features["logits"], predictor.make_logits(trained)(images[:3]), rtol=1e-4, atol=1e-4)


def test_images_are_taken_with_or_without_their_channel(images):
    for dtype, sent in ((np.uint8, images), (np.float32, images / 255)):
        for form in (sent, sent[..., None]):
            checked = predictor.check_images(form, 28)
            assert checked.dtype == dtype and checked.shape == (23, 28, 28)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((28, 28), np.uint8), r"shape \[28, 28\]: give \[n, 28, 28\]"),
        (np.zeros((2, 28, 28, 3), np.uint8), r"shape \[2, 28, 28, 3\]"),
        (np.zeros((2, 28, 28), np.int64), "are int64"),
        (np.full((1, 28, 28), 1.5), "range from 1.5 to 1.5"),
        (np.full((1, 28, 28), np.nan), "range from nan"),
    ],
)
def test_what_are_no_images_is_refused(images, message):
    with pytest.raises(UserError, match=message):
        predictor.check_images(images, 28)
