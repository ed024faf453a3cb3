"""What training carries from step to step, and how it begins: parameters, optimizer state, averages, metrics."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from mnist_flax.models.cnn import CNN, Ensemble, make_model
from mnist_flax.ops.random import make_key
from mnist_flax.runtime.config import flatten
from mnist_flax.runtime.devices import REPLICATED
from mnist_flax.runtime.settings import pinned
from mnist_flax.training.optimizer import make_optimizer

INIT, AUGMENT, DROPOUT = range(3)  # purposes that keys are derived for


class Sums(flax.struct.PyTreeNode):
    """Training metrics added up since the start of the epoch."""

    loss: Float[Array, ""]  # sum over examples
    correct: Int[Array, ""]
    examples: Int[Array, ""]


class TrainState(flax.struct.PyTreeNode):
    """All that training carries from step to step."""

    step: Int[Array, ""]  # updates done
    params: dict
    batch_stats: dict  # running means and variances; empty without batch norm
    opt_state: optax.OptState
    ema: dict | None  # averages of {"params", "batch_stats"}; None without EMA
    sums: Sums

    def variables(self) -> dict:
        """What the model is evaluated with: the averages where there are any."""
        return self.ema if self.ema is not None else {"params": self.params, "batch_stats": self.batch_stats}


def hyperparameters(config: ConfigDict) -> dict[str, float]:
    """The continuous fields, which the compiled step takes as arguments: {"optimizer.learning_rate": 0.001, ...}.

    `num_epochs` is among them, since it only stretches the schedule.
    """
    groups = {group: config[group] for group in ("model", "optimizer", "augment")}
    continuous = {key: value for key, value in flatten(groups).items() if isinstance(value, float)}
    return continuous | {"num_epochs": float(config.num_epochs)}


def make_network(configs: Sequence[ConfigDict], num_classes: int) -> CNN | Ensemble:
    """The network of one config, or the ensemble of several."""
    networks = [make_model(config.model, hyperparameters(config), num_classes) for config in configs]
    return Ensemble(tuple(networks)) if len(networks) > 1 else networks[0]


def init_state(config: ConfigDict, num_classes: int, seed: Int[Array, ""] | int) -> TrainState:
    """A fresh state. Jit it: `seed` may be traced, the rest of the config is static."""
    hyper = hyperparameters(config)
    model = make_model(config.model, hyper, num_classes).clone(impl="lax")  # the same parameters, traced in less time
    variables = model.init(jax.random.fold_in(make_key(seed), INIT), jnp.zeros((1, 28, 28)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    optimizer = make_optimizer(config, hyper, lambda step: 0.0)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        # A copy, since a donated buffer may not appear twice.
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
        if config.optimizer.ema_decay > 0
        else None,
        sums=Sums(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )


def abstract_state(config: ConfigDict, num_classes: int, mesh: Mesh) -> TrainState:
    """Shapes, types and placement of a state: what a checkpoint is restored into, whatever devices saved it."""
    return _replicated(lambda: init_state(config, num_classes, 0), mesh)


def abstract_variables(network: CNN | Ensemble, mesh: Mesh) -> dict:
    """The same for the variables alone of a network."""
    return _replicated(lambda: network.init(make_key(0), jnp.zeros((1, 28, 28))), mesh)


@pinned()
def _replicated(init: Callable, mesh: Mesh) -> Any:
    replicated = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(init)
    )


def all_finite(tree) -> Bool[Array, ""]:
    """Whether no number in a tree of arrays is NaN or infinite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
