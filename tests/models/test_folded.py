import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import softmax

from mnist_flax.inference.run import Run
from mnist_flax.models import folded
from mnist_flax.models.cnn import join, make_model, scale_pixels
from mnist_flax.runtime import config as config_lib
from mnist_flax.training.state import hyperparameters, init_state, make_network

DEEP = {"channels": (3, 5, 4), "kernel_sizes": (3, 5, 2), "pool_sizes": (2, 1, 3)}
NETWORKS = {
    "plain": {"channels": (4, 6), "pool_sizes": (2,), "dense": (16,)},
    "norms": DEEP | {"batch_norm": True, "logits_batch_norm": True, "dense": (9, 7)},
    "valid_average": DEEP | {"padding": "VALID", "head": "average", "batch_norm": True, "dense": ()},
    "no_pooling": {"channels": (3,), "pool_sizes": (1,), "dense": (), "logits_batch_norm": True},
}


def model_config(fields: dict):
    config = config_lib.default_config()
    config.model.update({"compute_dtype": "float32", "conv": "lax"} | fields)
    config_lib.check_config(config)
    return config


def random_variables(config, seed: int = 0) -> dict:
    """Variables as a training might leave them: no bias, mean or scale keeps its first value."""
    state = jax.jit(lambda: init_state(config, 10, seed))()
    rng = np.random.default_rng(seed)

    def shaken(path, leaf):
        if leaf.ndim > 1:
            return leaf
        noise = rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key in ("scale", "var") else rng.normal(size=leaf.shape)
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(shaken, {"params": state.params, "batch_stats": state.batch_stats})


def network(config):
    return make_model(config.model, hyperparameters(config), 10)


class Residual(nn.Module):
    """A network unknown to the package, in the habits of Linen."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(images))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x + y))
        return nn.Dense(10)(x.mean((1, 2)))


def plugged_in(network: nn.Module) -> Run:
    """A run of a module that the config does not make, with random weights."""
    config = config_lib.default_config()
    config.model = ConfigDict({"depth": 1})
    variables = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    return Run(None, config, network, jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, variables), tuple("0123456789"))


def layers_in_numpy(config, variables, images) -> dict[str, np.ndarray]:
    """What each layer makes of pixels, and the logits, in float64 with nothing but NumPy."""
    fields, arrays = config.model, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, found, x = arrays["params"], {}, images[..., None] / 255

    def norm(x, name):
        if name not in params:
            return x
        stats = arrays["batch_stats"][name]
        return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params[name]["scale"] + params[name]["bias"]

    layers = len(fields.channels)
    for i, pool in enumerate(config_lib.per_layer(fields.pool_sizes, layers)):
        kernel = params[f"conv{i}_kernel"]
        if fields.padding == "SAME":
            total = len(kernel) - 1
            x = np.pad(x, ((0, 0), *[(total // 2, total - total // 2)] * 2, (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
        x = np.einsum("bhwcij,ijcf->bhwf", patches, kernel) + params.get(f"conv{i}_bias", 0)
        size = x.shape[1] // pool
        x = np.maximum(norm(x, f"norm{i}"), 0)[:, : size * pool, : size * pool]
        x = x.reshape(len(x), size, pool, size, pool, -1)
        x = found[f"conv{i}"] = x.max((2, 4))
    x = x.mean((1, 2)) if fields.head == "average" else x.reshape(len(x), -1)
    for i in range(len(fields.dense)):
        x = found[f"dense{i}"] = np.maximum(x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"], 0)
    return found | {"logits": norm(x @ params["logits"]["kernel"] + params["logits"]["bias"], "logits_norm")}


def linen_logits(config, variables, images):
    return jax.jit(network(config).apply)(variables, scale_pixels(images))


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("impl", ["lax", "matmul"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_and_its_folded_form_compute_what_numpy_does(name, impl, images):
    config = model_config(NETWORKS[name] | {"conv": impl})
    variables = random_variables(config)
    expected = layers_in_numpy(config, variables, images)
    assert softmax(expected["logits"], axis=1).max(1).min() < 0.999  # not saturated: a difference would show
    np.testing.assert_allclose(linen_logits(config, variables, images), expected["logits"], rtol=1e-4, atol=1e-5)
    plain, parameters = folded.fold_batch_norm(network(config), variables)
    found = jax.jit(lambda images: folded.features(plain, parameters, scale_pixels(images)))(images)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)


def test_folded_parameters_are_those_of_a_model_without_batch_norm():
    config = model_config(NETWORKS["norms"] | {"compute_dtype": "bfloat16"})
    plain, parameters = folded.fold_batch_norm(network(config), random_variables(config))
    assert not plain.batch_norm and plain.compute_dtype == jnp.float32
    shapes = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, 28, 28)))
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, shapes)


def test_folding_is_exact_where_variances_are_tiny():
    """A dead channel has variance 0: epsilon alone is under the root."""
    config = model_config({"channels": (2,), "pool_sizes": (2,), "batch_norm": True, "dense": ()})
    variables = random_variables(config)
    variables["batch_stats"]["norm0"]["var"] = jnp.zeros(2)
    kernel, norm = variables["params"]["conv0_kernel"], variables["params"]["norm0"]
    params = folded.fold_batch_norm(network(config), variables)[1]["params"]
    factor = np.asarray(norm["scale"], np.float64) / np.sqrt(1e-5)
    np.testing.assert_allclose(params["conv0_kernel"], np.asarray(kernel) * factor, rtol=1e-6)
    shift = np.asarray(norm["bias"], np.float64) - np.asarray(variables["batch_stats"]["norm0"]["mean"]) * factor
    np.testing.assert_allclose(params["conv0_bias"], shift, rtol=1e-5)


def test_features_of_any_module_are_in_the_order_of_computation(images):
    plugged = plugged_in(Residual())
    unchanged = folded.fold_batch_norm(plugged.model, plugged.variables)
    assert unchanged == (plugged.model, plugged.variables)
    images = scale_pixels(images)[..., None]
    found = jax.jit(lambda images: folded.features(*unchanged, images))(images)
    assert list(found) == ["stem", "Conv_0", "BatchNorm_0", "Dropout_0", "Dense_0"]
    np.testing.assert_allclose(found["Dense_0"], plugged.model.apply(plugged.variables, images), rtol=1e-5, atol=1e-5)


def ensemble(*names: str):
    """An ensemble of `NETWORKS`, the configs of its members, their variables, and those of all together."""
    configs = [model_config(NETWORKS[name]) for name in names]
    variables = [random_variables(config, seed) for seed, config in enumerate(configs)]
    return make_network(configs, 10), configs, variables, join(variables)


def test_an_ensemble_gives_the_mean_of_its_members_probabilities(images):
    """Folded or not; the reference averages in float64, outside of both."""
    together, configs, variables, joined = ensemble("plain", "norms", "plain")
    each = np.stack([linen_logits(*pair, images) for pair in zip(configs, variables, strict=True)])
    expected = softmax(each.astype(np.float64), axis=-1).mean(0)
    assert np.ptp(softmax(each, axis=-1), axis=0).max() > 0.1  # they do differ
    logits = jax.jit(together.apply)(joined, scale_pixels(images))
    np.testing.assert_allclose(logits, np.log(expected), rtol=1e-4, atol=1e-4)
    plain, parameters = folded.fold_batch_norm(together, joined)
    np.testing.assert_allclose(jax.jit(plain.apply)(parameters, scale_pixels(images)), np.log(expected), atol=1e-4)
    found = folded.features(plain, parameters, scale_pixels(images))
    for name, values in layers_in_numpy(configs[0], variables[0], images).items():  # of the first member
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_networks_that_are_certain_has_finite_logits(images):
    together, _, variables, _ = ensemble("plain", "plain")
    certain = join([jax.tree.map(lambda leaf: 30 * leaf, each) for each in variables])
    logits = jax.jit(together.apply)(certain, scale_pixels(images))
    assert np.isfinite(logits).all() and float(logits.min()) < -200  # whose probability is 0 in float32
    np.testing.assert_allclose(np.exp(np.asarray(logits, np.float64)).sum(1), 1, rtol=1e-4)
