"""The train step, and many of them as one compiled program.

Everything random in step `s` derives from `(seed, s, position in the batch)`, so a run is a function of its config,
whatever the number of devices, and the step number is all that resuming needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from mnist_flax.data.feed import Block
from mnist_flax.models.cnn import make_model, scale_pixels
from mnist_flax.ops.random import make_key
from mnist_flax.runtime.devices import BATCH_AXIS, BATCH_SHARDED, REPLICATED
from mnist_flax.runtime.settings import pinned
from mnist_flax.training.augment import augment, strength_at
from mnist_flax.training.loss import cross_entropy
from mnist_flax.training.optimizer import Hyperparameters, make_optimizer, make_schedule, update_ema
from mnist_flax.training.state import AUGMENT, DROPOUT, Sums, TrainState


class Batch(NamedTuple):
    """A device's share of a batch."""

    images: UInt8[Array, "share height width"]
    labels: Int[Array, " share"]
    positions: Int[Array, " share"]  # in the whole batch


def example_keys(
    seed: Int[Array, ""] | int, purpose: int, step: Int[Array, ""], positions: Int[Array, " batch"]
) -> Key[Array, " batch"]:
    """One key for each example of a batch, from its position in the whole batch."""
    key = jax.random.fold_in(jax.random.fold_in(make_key(seed), purpose), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def make_train_step(
    config: ConfigDict,
    num_classes: int,
    steps_per_epoch: int | Int[Array, ""],
    probe: Callable[[str, Any], Any] | None = None,
) -> Callable[[TrainState, Hyperparameters, Any, Batch], tuple[TrainState, dict[str, Any]]]:
    """One update of a device's share of a batch: `step(state, hyper, seed, batch) -> (state, probed)`.

    `config` decides what is compiled: layers, parts of the optimizer and shapes. `steps_per_epoch` may be traced.
    Gradients and metrics are those of the whole batch: means and sums over the devices of `BATCH_AXIS`.

    Args:
      probe: `probe(name, value)` is asked of "images", "labels", "outputs" (of all layers, as Flax's intermediates),
        "loss", "gradients", "averages" (the optimizer's state) and "params" (the updated ones); `probed` has what it
        returns by these names, "outputs" and "loss" with a leading axis of `accumulate_steps`. Without one nothing is
        kept, and `probed` is empty.
    """
    collections = ("batch_stats", "intermediates") if probe else ("batch_stats",)

    def probed(**values: Any) -> dict[str, Any]:
        return {name: probe(name, value) for name, value in values.items()} if probe else {}

    def step(state: TrainState, hyper: Hyperparameters, seed, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        model = make_model(config.model, hyper, num_classes, BATCH_AXIS)
        schedule = make_schedule(config.optimizer.schedule, hyper, steps_per_epoch)
        optimizer = make_optimizer(config, hyper, schedule)

        def loss(params, batch_stats, images, labels, dropout_keys):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                dropout_keys=dropout_keys,
                mutable=collections,
                capture_intermediates=probe is not None,
            )
            losses = cross_entropy(logits, labels, hyper["optimizer.label_smoothing"])
            sums = Sums(losses.sum(), (logits.argmax(-1) == labels).sum(), jnp.int32(labels.size))
            return losses.mean(), (updates, sums)

        def gradient(batch_stats, part):
            (value, (updates, sums)), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch_stats, *part)
            found = probed(outputs=updates.get("intermediates"), loss=value)
            return updates.get("batch_stats", {}), (grads, sums, found)

        examples = prepare_batch(config, hyper, seed, state.step, steps_per_epoch, batch)
        parts = config.optimizer.accumulate_steps
        if parts == 1:
            batch_stats, (grads, sums, found) = gradient(state.batch_stats, examples)
        else:
            batch_stats, (grads, sums, found) = lax.scan(gradient, state.batch_stats, split_parts(examples, parts))
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
        found |= probed(images=examples[0], labels=batch.labels, gradients=grads, averages=opt_state, params=params)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema, sums), found

    return step


def prepare_batch(
    config: ConfigDict, hyper: Hyperparameters, seed, step: Int[Array, ""], steps_per_epoch, batch: Batch
) -> tuple[Float[Array, "share height width"], Int[Array, " share"], Key[Array, " share"]]:
    """What the network is trained on in a step: augmented images in [0, 1], labels, and a key an example for dropout.

    Arguments are those of `make_train_step` and its step.
    """
    images = scale_pixels(batch.images)
    fields = {name: hyper[f"augment.{name}"] for name, value in config.augment.items() if value}
    strength = strength_at(step / steps_per_epoch, hyper["num_epochs"], fields)
    images = augment(example_keys(seed, AUGMENT, step, batch.positions), images, strength)
    return images, batch.labels, example_keys(seed, DROPOUT, step, batch.positions)


def split_parts(batch, parts: int):
    """A batch, a tree of arrays [share, ...], as arrays [parts, share / parts, ...] to go through the model in turn.

    Part i takes examples i, i + parts, ...: the same parts of the whole batch for any number of devices.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def take_batch(block: Block, i) -> Batch:
    """This device's share of batch `i` of a block, within `BATCH_AXIS`."""
    rows = lax.dynamic_index_in_dim(block.order, i, keepdims=False)
    positions = lax.axis_index(BATCH_AXIS) * len(rows) + jnp.arange(len(rows))
    return Batch(block.images[rows], block.labels[rows], positions)


def run_steps(train_step: Callable, state: TrainState, hyper: Hyperparameters, seed, block: Block) -> TrainState:
    """Runs `train_step` on the batches of a block whose examples are in one row, within `BATCH_AXIS`.

    Stops after a step whose loss is not finite. `block.start` and `block.stop` may be traced.
    """

    def unfinished(carry):
        i, state = carry
        return (i < block.stop) & jnp.isfinite(state.sums.loss)

    def body(carry):
        i, state = carry
        return i + 1, train_step(state, hyper, seed, take_batch(block, i))[0]

    return lax.while_loop(unfinished, body, (block.start, state))[1]


def over_devices(function: Callable, mesh: Mesh) -> Callable:
    """`function(state, hyper, seed, block)` on every device's share of the batches, examples being in one row."""

    def sharded(state, hyper, seed, block: Block):
        examples = BATCH_SHARDED if block.labels.ndim == 2 else REPLICATED  # streamed, or a whole split
        specs = Block._make((examples, examples, BATCH_SHARDED, REPLICATED, REPLICATED))

        def local(state, hyper, seed, block: Block):
            images, labels = block.images, block.labels
            images = images.reshape(-1, *images.shape[labels.ndim :])
            return function(state, hyper, seed, block._replace(images=images, labels=labels.reshape(-1)))

        in_specs = (REPLICATED, REPLICATED, REPLICATED, specs)
        run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False)
        return run(state, hyper, seed, block)

    return sharded


def make_train_steps(config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Callable:
    """Many steps as one program: `(state, hyper, seed, block) -> (state, last)`.

    Runs the batches `block.start` to `block.stop`, which are traced, so no number of steps compiles anew.
    Stops after a step whose loss is not finite. `last` repeats the metrics, since the state will be donated.
    """
    train_step = make_train_step(config, num_classes, steps_per_epoch)

    def steps(state, hyper, seed, block):
        state = run_steps(train_step, state, hyper, seed, block)
        return state, {"step": state.step, "sums": state.sums}

    return pinned()(jax.jit(over_devices(steps, mesh), donate_argnums=0))
