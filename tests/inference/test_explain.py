import jax
import numpy as np
import pytest

from mnist_flax.inference import explain
from mnist_flax.inference.run import Run
from tests.models.test_folded import NETWORKS, Residual, ensemble, model_config, network, plugged_in, random_variables

TEMPERATURE = 1.3


@pytest.fixture(scope="module", params=["plain", "norms", "ensemble", "residual"])
def trained(request) -> Run:
    if request.param == "ensemble":
        together, configs, _, variables = ensemble("plain", "plain")
        return Run(None, configs[0], together, variables, tuple("0123456789"))
    if request.param == "residual":
        return plugged_in(Residual())
    config = model_config(NETWORKS[request.param])
    return Run(None, config, network(config), random_variables(config), tuple("0123456789"))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    image = np.zeros((28, 28), np.uint8)
    image[5:23, 9:18] = np.random.default_rng(0).integers(0, 256, (18, 9))
    return image


@pytest.fixture(scope="module")
def odds(trained):
    """Log-odds of a class for images in [0, 1], by the Linen model itself in float64 outside of it."""
    apply = jax.jit(lambda images: trained.model.apply(trained.variables, images[..., None]))

    def log_odds(images, target: int) -> np.ndarray:
        logits = np.asarray(apply(np.asarray(images, np.float32)), np.float64) / TEMPERATURE
        others = np.delete(logits, target, axis=1)
        return logits[:, target] - np.log(np.exp(others - others.max(1, keepdims=True)).sum(1)) - others.max(1)

    return log_odds


@pytest.mark.parametrize("target", [0, 7])
def test_gradient_is_the_change_of_the_log_odds(trained, odds, target):
    image = np.random.default_rng(2).integers(0, 256, (28, 28), np.uint8)  # on flat paper, pooling has no gradient
    gradient = explain.make_explain(trained, TEMPERATURE)(image, target).gradient
    direction = np.random.default_rng(1).normal(size=(5, 28, 28))
    step = 1e-4
    up, down = (odds(image / 255 + sign * step * direction, target) for sign in (1, -1))
    np.testing.assert_allclose((gradient * direction).sum((1, 2)), (up - down) / (2 * step), rtol=0.05, atol=0.02)


def test_occlusion_is_what_covering_costs(trained, image, odds):
    found = explain.make_explain(trained, TEMPERATURE)(image, 3).occlusion
    lost, covering = np.zeros((28, 28)), np.zeros((28, 28))
    whole = odds(image[None] / 255, 3)[0]
    for top in range(-2, 28, 2):
        for left in range(-2, 28, 2):
            place = slice(max(0, top), top + 5), slice(max(0, left), left + 5)
            covered = image / 255
            covered[place] = 0
            lost[place] += whole - odds(covered[None], 3)[0]
            covering[place] += 1
    assert (covering > 0).all()
    np.testing.assert_allclose(found, lost / covering, atol=1e-3)
    assert np.abs(found).max() > 0.01
    assert found[0, 0] == 0  # there is nothing to cover


def test_layers_lead_to_the_logits(trained, image):
    layers = explain.make_explain(trained, TEMPERATURE)(image, 0).layers
    if isinstance(trained.model, Residual):
        assert {name: values.shape for name, values in layers.items()} == {
            "stem": (14, 14, 4),
            "Conv_0": (14, 14, 4),
            "BatchNorm_0": (14, 14, 4),
            "Dropout_0": (14, 14, 4),
            "Dense_0": (10,),
        }
        return
    count = len(trained.config.model.channels)
    names = [f"conv{i}" for i in range(count)] + [f"dense{i}" for i in range(len(trained.config.model.dense))]
    assert list(layers) == [*names, "logits"]
    for i in range(count):
        assert layers[f"conv{i}"].shape[-1] == trained.config.model.channels[i] and (layers[f"conv{i}"] >= 0).all()
