import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from mnist_flax.models.cnn import join, make_model, normalize
from mnist_flax.runtime import config as config_lib
from mnist_flax.training import step

DEEP = {"channels": (3, 5, 4), "kernel_sizes": (3, 5, 2), "strides": (1, 2, 1), "pool_sizes": (2, 1, 3)}
NETWORKS = {
    "plain": {"channels": (4, 6), "pool_sizes": (2,), "dense": (16,)},
    "norms": DEEP | {"batch_norm": True, "logits_batch_norm": True, "dense": (9, 7)},
    "valid_average": DEEP | {"padding": "VALID", "pooling": "avg", "head": "average", "batch_norm": True, "dense": ()},
    "no_pooling": {"channels": (3,), "strides": (2,), "pool_sizes": (1,), "dense": (), "logits_batch_norm": True},
}


def model_config(fields: dict):
    config = config_lib.default_config()
    config.model.update({"compute_dtype": "float32", "conv": "lax"} | fields)
    config_lib.check(config)
    return config


def random_variables(config, seed: int = 0) -> dict:
    """Variables as a training might leave them: no bias, mean or scale keeps its first value."""
    state = jax.jit(lambda: step.init_state(config, 10, seed))()
    rng = np.random.default_rng(seed)

    def shaken(path, leaf):
        if leaf.ndim > 1:
            return leaf
        noise = rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key in ("scale", "var") else rng.normal(size=leaf.shape)
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(shaken, {"params": state.params, "batch_stats": state.batch_stats})


def network(config):
    return make_model(config.model, step.hyperparameters(config), 10)


def linen_logits(config, variables, images):
    return jax.jit(network(config).apply)(variables, normalize(images))


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_function_gives_what_the_linen_model_gives(name, images):
    config = model_config(NETWORKS[name])
    variables = random_variables(config)
    expected = jax.nn.softmax(linen_logits(config, variables, images))
    parameters = inference.fold_batch_norm(network(config), variables)
    result = jax.jit(lambda images: inference.probabilities(network(config), parameters, images))(images)
    assert result.dtype == jnp.float32
    assert float(expected.max(1).min()) < 0.999  # not saturated: a difference would show
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


def test_folded_parameters_are_those_of_a_model_without_batch_norm(images):
    config = model_config(NETWORKS["norms"])
    variables = random_variables(config)
    expected = linen_logits(config, variables, images)
    parameters = inference.fold_batch_norm(network(config), variables)
    config.model.batch_norm = config.model.logits_batch_norm = False
    shapes = jax.eval_shape(lambda: step.init_state(config, 10, 0)).params
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(linen_logits(config, {"params": parameters}, images), expected, rtol=1e-4, atol=1e-5)


def test_folding_is_exact_where_variances_are_tiny():
    """A dead channel has variance 0: epsilon alone is under the root."""
    config = model_config({"channels": (2,), "pool_sizes": (2,), "batch_norm": True, "dense": ()})
    variables = random_variables(config)
    variables["batch_stats"]["norm0"]["var"] = jnp.zeros(2)
    kernel, norm = variables["params"]["conv0_kernel"], variables["params"]["norm0"]
    folded = inference.fold_batch_norm(network(config), variables)
    factor = np.asarray(norm["scale"], np.float64) / np.sqrt(1e-5)
    np.testing.assert_allclose(folded["conv0_kernel"], np.asarray(kernel) * factor, rtol=1e-6)
    shift = np.asarray(norm["bias"], np.float64) - np.asarray(variables["batch_stats"]["norm0"]["mean"]) * factor
    np.testing.assert_allclose(folded["conv0_bias"], shift, rtol=1e-5)


def ensemble(*names: str):
    """An ensemble of `NETWORKS`, the configs of its members, their variables, and those of all together."""
    configs = [model_config(NETWORKS[name]) for name in names]
    variables = [random_variables(config, seed) for seed, config in enumerate(configs)]
    return step.make_network(configs, 10), configs, variables, join(variables)


def test_an_ensemble_gives_the_mean_of_its_members_probabilities(images):
    """Of the Linen model and of the plain function alike; the reference averages in float64, outside of both."""
    together, configs, variables, joined = ensemble("plain", "norms", "plain")
    each = np.stack([linen_logits(*pair, images) for pair in zip(configs, variables, strict=True)])
    expected = softmax(each.astype(np.float64), axis=-1).mean(0)
    assert np.ptp(softmax(each, axis=-1), axis=0).max() > 0.1  # they do differ
    logits = jax.jit(together.apply)(joined, normalize(images))
    np.testing.assert_allclose(logits, np.log(expected), rtol=1e-4, atol=1e-4)
    parameters = inference.fold_batch_norm(together, joined)
    plain = jax.jit(lambda images: inference.probabilities(together, parameters, images))(images)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-6)
    found = jax.jit(lambda images: inference.activations(together, parameters, normalize(images)))(images)
    np.testing.assert_allclose(found["logits"], np.log(expected), rtol=1e-4, atol=1e-4)
    first = inference.activations(together.members[0], parameters[0], normalize(images))
    assert list(found) == list(first)
    np.testing.assert_allclose(found["conv1"], first["conv1"], rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_networks_that_are_certain_has_finite_logits(images):
    together, _, variables, _ = ensemble("plain", "plain")
    certain = join([jax.tree.map(lambda leaf: 30 * leaf, each) for each in variables])
    logits = jax.jit(together.apply)(certain, normalize(images))
    assert np.isfinite(logits).all() and float(logits.min()) < -200  # whose probability is 0 in float32
    np.testing.assert_allclose(np.exp(np.asarray(logits, np.float64)).sum(1), 1, rtol=1e-4)
