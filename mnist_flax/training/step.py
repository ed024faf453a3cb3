"""Training as pure functions: the state, the compiled steps, and the logits of a whole split.

Everything random in step `s` derives from `(seed, s, position in the batch)`, so a run is a function of its config,
whatever the number of devices, and the step number is all that resuming needs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from mnist_flax.inference.tta import Views
from mnist_flax.models.cnn import CNN, Ensemble, make_model, normalize
from mnist_flax.ops.random import make_key
from mnist_flax.runtime.config import flatten
from mnist_flax.runtime.devices import BATCH_AXIS, BATCHES, EVERYWHERE, put
from mnist_flax.runtime.settings import pinned
from mnist_flax.training.augment import augment, strength_at
from mnist_flax.training.optimizer import Hyperparameters, make_optimizer, make_schedule, update_ema

_INIT, _AUGMENT, _DROPOUT = range(3)  # purposes that keys are derived for


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
    variables = model.init(jax.random.fold_in(make_key(seed), _INIT), jnp.zeros((1, 28, 28)))
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
    replicated = NamedSharding(mesh, EVERYWHERE)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(init)
    )


def example_keys(
    seed: Int[Array, ""] | int, purpose: int, step: Int[Array, ""], positions: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """One key for each example of a batch, from its position in the whole batch."""
    key = jax.random.fold_in(jax.random.fold_in(make_key(seed), purpose), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def make_train_step(config: ConfigDict, num_classes: int, steps_per_epoch: int | Int[Array, ""]) -> Callable:
    """One update of a device's share of a batch: `step(state, hyper, seed, images, labels, positions) -> state`.

    `config` decides what is compiled: layers, parts of the optimizer and shapes. `steps_per_epoch` may be traced.

    `images` are uint8 [share, 28, 28], `labels` int32 [share], `positions` the share's places in the whole batch.
    Gradients and metrics are those of the whole batch: means and sums over the devices of `BATCH_AXIS`.
    """

    def step(state: TrainState, hyper: Hyperparameters, seed, images, labels, positions) -> TrainState:
        model = make_model(config.model, hyper, num_classes, BATCH_AXIS)
        schedule = make_schedule(config.optimizer.schedule, hyper, steps_per_epoch)
        optimizer = make_optimizer(config, hyper, schedule)

        loss_fn = partial(loss, model, hyper)

        def gradient(batch_stats, part):
            (_, (updates, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch_stats, *part)
            return updates.get("batch_stats", {}), (grads, sums)

        batch = prepare_batch(config, hyper, seed, state.step, steps_per_epoch, images, labels, positions)
        parts = config.optimizer.accumulate_steps
        if parts == 1:
            batch_stats, (grads, sums) = gradient(state.batch_stats, batch)
        else:
            batch_stats, (grads, sums) = lax.scan(gradient, state.batch_stats, split_parts(batch, parts))
            grads = jax.tree.map(lambda g: g.mean(0), grads)
            sums = jax.tree.map(lambda s: s.sum(0), sums)
        grads = lax.pmean(grads, BATCH_AXIS)
        sums = lax.psum(sums, BATCH_AXIS)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            now = {"params": params, "batch_stats": batch_stats}
            ema = update_ema(ema, now, hyper["optimizer.ema_decay"], state.step)
        first = state.step % steps_per_epoch == 0
        sums = jax.tree.map(lambda old, new: jnp.where(first, new, old + new), state.sums, sums)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema, sums)

    return step


def prepare_batch(
    config: ConfigDict, hyper: Hyperparameters, seed, step: Int[Array, ""], steps_per_epoch, images, labels, positions
) -> tuple[Float[Array, "share 28 28"], Int[Array, " share"], Key[Array, " share"]]:
    """What the network is trained on in a step: augmented images in [0, 1], labels, and a key an example for dropout.

    Arguments are those of `make_train_step`'s step.
    """
    images = normalize(images)
    fields = {name: hyper[f"augment.{name}"] for name, value in config.augment.items() if value}
    strength = strength_at(step / steps_per_epoch, hyper["num_epochs"], fields)
    images = augment(example_keys(seed, _AUGMENT, step, positions), images, strength)
    return images, labels, example_keys(seed, _DROPOUT, step, positions)


def split_parts(batch, parts: int):
    """A batch, a tree of arrays [share, ...], as arrays [parts, share / parts, ...] to go through the model in turn.

    Part i takes examples i, i + parts, ...: the same parts of the whole batch for any number of devices.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def loss(
    model: CNN,
    hyper: Hyperparameters,
    params: dict,
    batch_stats: dict,
    images: Float[Array, "batch 28 28"],
    labels: Int[Array, " batch"],
    dropout_keys: Key[Array, " batch"],
    collections: Sequence[str] = ("batch_stats",),
) -> tuple[Float[Array, ""], tuple[Any, Sums]]:
    """Mean loss in training mode; beside it the `collections` that the model wrote, and the metrics' sums.

    "intermediates" among the collections are the outputs of all layers.
    """
    logits, updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        dropout_keys=dropout_keys,
        mutable=collections,
        capture_intermediates="intermediates" in collections,
    )
    losses = cross_entropy(logits, labels, hyper["optimizer.label_smoothing"])
    sums = Sums(losses.sum(), (logits.argmax(-1) == labels).sum(), jnp.int32(labels.size))
    return losses.mean(), (updates, sums)


def all_finite(tree) -> Bool[Array, ""]:
    """Whether no number in a tree of arrays is NaN or infinite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], label_smoothing: float | Float[Array, ""] = 0.0
) -> Float[Array, " batch"]:
    """Cross-entropy in nats with smoothed labels (Szegedy et al. 2016)."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def run_steps(
    train_step: Callable, state: TrainState, hyper: Hyperparameters, seed, images, labels, order, start, stop
) -> TrainState:
    """Runs `train_step` on the batches `order[start:stop]` ([steps, share] rows of `images`), within `BATCH_AXIS`.

    Stops after a step whose loss is not finite. `start` and `stop` may be traced.
    """
    share = order.shape[1]
    positions = lax.axis_index(BATCH_AXIS) * share + jnp.arange(share)

    def unfinished(carry):
        i, state = carry
        return (i < stop) & jnp.isfinite(state.sums.loss)

    def body(carry):
        i, state = carry
        rows = lax.dynamic_index_in_dim(order, i, keepdims=False)
        return i + 1, train_step(state, hyper, seed, images[rows], labels[rows], positions)

    return lax.while_loop(unfinished, body, (start, state))[1]


def make_train_steps(config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Callable:
    """Many steps as one program: `(state, hyper, seed, images, labels, order, start, stop) -> (state, last)`.

    Runs the batches `order[start:stop]` ([steps, batch] rows of `images`); `start` and `stop` are traced, so no number
    of steps compiles anew. Images are the whole split, replicated ([examples, 28, 28], feed `device`), or one block of
    batches, split over devices ([steps, batch, 28, 28], feed `stream`, where `order` counts within a device's share).
    Stops after a step whose loss is not finite. `last` repeats the metrics, since the state will be donated.
    """
    train_step = make_train_step(config, num_classes, steps_per_epoch)

    def steps(state, hyper, seed, images, labels, order, start, stop):
        images, labels = images.reshape(-1, 28, 28), labels.reshape(-1)
        state = run_steps(train_step, state, hyper, seed, images, labels, order, start, stop)
        return state, {"step": state.step, "sums": state.sums}

    def sharded(state, hyper, seed, images, labels, order, start, stop):
        data = BATCHES if images.ndim == 4 else EVERYWHERE
        return jax.shard_map(
            steps,
            mesh=mesh,
            in_specs=(EVERYWHERE, EVERYWHERE, EVERYWHERE, data, data, BATCHES, EVERYWHERE, EVERYWHERE),
            out_specs=EVERYWHERE,
            check_vma=False,
        )(state, hyper, seed, images, labels, order, start, stop)

    return pinned()(jax.jit(sharded, donate_argnums=0))


def split_batches(mesh: Mesh, images, labels, batch_size: int) -> tuple[Array, Array]:
    """A split on the devices in padded batches: images [batches, batch, 28, 28] and labels, -1 where padded.

    Batches are a multiple of 8 on each device: on CPUs a prime number of examples takes five times as long.
    """
    divisor = 8 * mesh.shape[BATCH_AXIS]
    batch_size = -(-batch_size // divisor) * divisor
    count = -(-len(labels) // batch_size)
    padding = count * batch_size - len(labels)
    images = np.pad(images, ((0, padding), (0, 0), (0, 0))).reshape(count, batch_size, 28, 28)
    labels = np.pad(labels, (0, padding), constant_values=-1).reshape(count, batch_size)
    return put((images, labels), mesh, BATCHES)


def evaluate_batches(
    model: CNN | Ensemble | Views, variables: dict, images, labels
) -> tuple[dict, Float[Array, "batches share classes"]]:
    """Mean loss and accuracy over a whole split, and this device's logits: see `make_evaluate`; within `BATCH_AXIS`."""
    logits = lax.map(lambda batch: model.apply(variables, normalize(batch)), images)
    real = labels >= 0
    loss = jnp.where(real, cross_entropy(logits, jnp.maximum(labels, 0)), 0).sum()
    correct = (real & (logits.argmax(-1) == labels)).sum()
    loss, correct, count = lax.psum((loss, correct, real.sum()), BATCH_AXIS)
    return {"loss": loss / count, "accuracy": correct / count}, logits


def make_evaluate(model: CNN | Ensemble | Views, mesh: Mesh) -> Callable:
    """Whole-split evaluation: `(variables, images, labels) -> ({"loss", "accuracy"}, logits)` of `split_batches`.

    Loss is the mean cross-entropy and accuracy the fraction correct over exactly the examples that are not padding.
    Logits are float32 [batches, batch, classes], padding included, whole on every device.
    """
    evaluate = jax.shard_map(
        partial(evaluate_batches, model),
        mesh=mesh,
        in_specs=(EVERYWHERE, BATCHES, BATCHES),
        out_specs=(EVERYWHERE, BATCHES),
        check_vma=False,
    )
    return pinned()(jax.jit(evaluate, out_shardings=NamedSharding(mesh, EVERYWHERE)))


@pinned()
def split_logits(
    evaluate: Callable, variables: dict, split, batch_size: int, mesh: Mesh
) -> Float[np.ndarray, "examples classes"]:
    """Logits of every example of a `datasets.Split`, whole: nothing is dropped and nothing counted twice.

    `evaluate` is from `make_evaluate`; it is called with one padded batch at a time, so that it compiles once
    for splits of any size.
    """
    logits = []
    for start in range(0, len(split.labels), batch_size):
        images, labels = (array[start : start + batch_size] for array in split)
        batch = split_batches(mesh, images, labels, batch_size)
        logits.append(np.asarray(evaluate(variables, *batch)[1][0])[: len(labels)])
    return np.concatenate(logits)
