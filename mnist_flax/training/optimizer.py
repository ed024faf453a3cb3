"""Optimizers and learning-rate schedules from config, as optax chains.

Continuous hyperparameters arrive as a mapping of dotted config names to scalars that may be traced, so that one
compiled program serves every learning rate, and a population can give each member its own.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from optax import contrib

Scalar = float | Float[Array, ""]
Hyperparameters = Mapping[str, Scalar]
_ONE_CYCLE_START = 1 / 25  # first learning rate over the peak, as in Smith and Topin's code


def make_schedule(
    name: str, hyper: Hyperparameters, steps_per_epoch: int | Int[Array, ""]
) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """Learning rate as a function of the number of updates done.

    `constant` and `cosine` (Loshchilov and Hutter 2017: to `final_scale` of the peak, after the last step) rise
    linearly over `warmup_epochs`: the first of w steps has 1/w of the peak, the last all of it. Nothing begins at 0,
    which optimizers that estimate their own step size, such as Prodigy, would divide by. `one_cycle` (Smith and
    Topin 2018) rises along a cosine from 1/25 of the peak over `warmup_epochs`, then falls along one.
    """
    peak, final = hyper["optimizer.learning_rate"], hyper["optimizer.final_scale"]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        total = jnp.float32(steps_per_epoch * hyper["num_epochs"])
        warmup = jnp.float32(hyper["optimizer.warmup_epochs"] * steps_per_epoch)
        rise = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1)
        fall = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
        falling_cosine = final + (1 - final) * (1 + jnp.cos(jnp.pi * fall)) / 2
        match name:
            case "constant":
                scale = rise
            case "cosine":
                scale = rise * falling_cosine
            case "one_cycle":
                rising_cosine = 1 - (1 - _ONE_CYCLE_START) * (1 + jnp.cos(jnp.pi * (step / jnp.maximum(warmup, 1)))) / 2
                scale = jnp.where(step < warmup, rising_cosine, falling_cosine)
        return peak * scale

    return schedule


def make_optimizer(config: ConfigDict, hyper: Hyperparameters, schedule) -> optax.GradientTransformation:
    """The optax chain of `config.optimizer`: clipping, the named optimizer, weight decay, learning rate.

    `config` decides which links the chain has, `hyper` the values. Weight decay acts on kernels only: as L2 penalty
    (added to the gradient) for adam and sgd, decoupled (Loshchilov and Hutter 2019) for the others.
    """
    optimizer = {key.partition(".")[2]: value for key, value in hyper.items() if key.startswith("optimizer.")}
    b1, b2, momentum = optimizer["b1"], optimizer["b2"], optimizer["momentum"]
    rule = {
        "adam": lambda: optax.scale_by_adam(b1, b2, optimizer["eps"]),
        "adamw": lambda: optax.scale_by_adam(b1, b2, optimizer["eps"]),
        "sgd": lambda: optax.trace(momentum, nesterov=config.optimizer.nesterov),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "muon": lambda: _scale_by_muon(momentum, config.optimizer.nesterov, b1, b2, optimizer["eps"]),
    }[config.optimizer.name]()
    decay = optax.add_decayed_weights(optimizer["weight_decay"], mask=_is_kernel)
    has_decay = config.optimizer.weight_decay > 0
    decoupled = config.optimizer.name not in ("adam", "sgd")
    links = [
        optax.clip_by_global_norm(optimizer["clip_norm"]) if config.optimizer.clip_norm > 0 else None,
        decay if has_decay and not decoupled else None,
        rule,
        decay if has_decay and decoupled else None,
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*(link for link in links if link is not None))


def _is_kernel(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _scale_by_muon(
    momentum: Scalar, nesterov: bool, b1: Scalar, b2: Scalar, eps: Scalar
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for kernels as matrices [all inputs, outputs], Adam for biases and norms.

    Updates of kernels have the size of Adam's (root mean square 0.2: Liu et al. 2025), so that one learning rate
    serves both.
    """

    def as_matrix(params):
        return jax.tree.map(lambda p: contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1), params)

    def scale(updates, params):
        return jax.tree.map(lambda u: 0.2 * max(u.size // u.shape[-1], u.shape[-1]) ** 0.5 * u, updates)

    muon = optax.chain(
        contrib.scale_by_muon(beta=momentum, nesterov=nesterov, weight_dimension_numbers=as_matrix),
        optax.stateless(scale),
    )
    return optax.partition({True: muon, False: optax.scale_by_adam(b1, b2, eps)}, _is_kernel)


def update_ema(average, value, decay: Scalar, step: Int[Array, ""]):
    """Exponential moving average of a tree, short at first: decay is at most (1 + step) / (10 + step)."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, v: decay * a + (1 - decay) * v, average, value)
