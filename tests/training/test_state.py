import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mnist_flax.runtime.devices import make_mesh
from mnist_flax.training.state import abstract_state, all_finite, hyperparameters, init_state
from tests.training.test_step import config_for


def test_all_finite_sees_every_leaf():
    good = {"a": jnp.ones(3), "b": (jnp.zeros((2, 2)), jnp.arange(3))}
    assert all_finite(good)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite(good | {"a": good["a"].at[1].set(bad)})


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_state_is_restored_into_the_shapes_of_a_fresh_one(decay):
    config, mesh = config_for(**{"optimizer.ema_decay": decay, "model.batch_norm": True}), make_mesh()
    fresh = init_state(config, 10, 0)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    abstract = abstract_state(config, 10, mesh)
    assert kinds(abstract) == kinds(fresh)
    assert {leaf.sharding for leaf in jax.tree.leaves(abstract)} == {NamedSharding(mesh, PartitionSpec())}


def test_the_averages_are_evaluated_where_there_are_any():
    plain = init_state(config_for(**{"model.batch_norm": True}), 10, 0)
    averaged = init_state(config_for(**{"model.batch_norm": True, "optimizer.ema_decay": 0.9}), 10, 0)
    assert plain.ema is None and plain.variables() == {"params": plain.params, "batch_stats": plain.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, averaged.ema, plain.variables())  # they begin as the parameters
    moved = averaged.replace(params=jax.tree.map(jnp.zeros_like, averaged.params))
    assert moved.variables() is moved.ema


def test_continuous_fields_are_arguments_and_all_others_are_compiled():
    config = config_for(**{"optimizer.learning_rate": 0.25, "augment.rotation": 9.0})
    hyper = hyperparameters(config)
    assert (hyper["optimizer.learning_rate"], hyper["augment.rotation"], hyper["num_epochs"]) == (0.25, 9.0, 2.0)
    assert {type(value) for value in hyper.values()} == {float}
    assert {"model.channels", "model.batch_norm", "optimizer.name", "seed", "batch_size"}.isdisjoint(hyper)
