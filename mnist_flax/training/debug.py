"""Debug mode: types and shapes are checked before the first step, and numbers after each one.

The compiled steps are those of any other run, called one at a time, so what is found is what happened. Where a number
is not finite the step is done again with all that lies between the batch and the new parameters looked at, in order.
(`jax.debug_nans` would name a primitive, not a layer, and cannot look into compiled loops.)
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, UInt8
from ml_collections import ConfigDict

from mnist_flax.models.cnn import make_model
from mnist_flax.runtime.cli import RunError
from mnist_flax.runtime.devices import BATCH_AXIS, BATCHES, EVERYWHERE
from mnist_flax.training import step
from mnist_flax.training.optimizer import make_optimizer, make_schedule


def checked(train_steps: Callable, config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Callable:
    """`train_steps` of `step.make_train_steps`, with every step checked.

    What it returns raises RunError where types or shapes are not what they should be, or a number is not finite: one
    line that names the layer.
    """
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    finite = jax.jit(step.all_finite)
    examine = make_examination(config, num_classes, steps_per_epoch, mesh)

    def steps(state, hyper, seed, images, labels, order, start, stop):
        arguments = (hyper, seed, images, labels, order)
        if start == stop:  # the call that compiles
            _check_shapes(train_steps, config, num_classes, state, arguments)
            return train_steps(state, *arguments, start, stop)
        for i in range(start, stop):
            before = copy(state)  # the step takes the state away
            state, last = train_steps(state, *arguments, i, i + 1)
            if not finite((state, last["sums"].loss)):
                found = jax.device_get(examine(before, *arguments, i))
                step, epoch = int(last["step"]), int(before.step) // steps_per_epoch + 1
                what = next(_wrongs(config.model, found), "a number is not finite, and was finite when computed again")
                raise RunError(f"step {step}, in epoch {epoch}: {what}; what was saved before is kept")
        return state, last

    return steps


def make_examination(config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Callable:
    """`examine(state, hyper, seed, images, labels, order, i)`: the step of batch i, as whether each value is good.

    Gives {"images", "labels", "loss"} and, by the names of the layers, {"outputs", "gradients", "averages", "updates"}.
    Arguments are those of `step.make_train_steps`.
    """

    def examine(state, hyper, seed, images, labels, order, i):
        images, labels = images.reshape(-1, 28, 28), labels.reshape(-1)
        model = make_model(config.model, hyper, num_classes, BATCH_AXIS)
        share = order.shape[1]
        positions = lax.axis_index(BATCH_AXIS) * share + jnp.arange(share)
        rows = order[i]
        batch = step.prepare_batch(
            config, hyper, seed, state.step, steps_per_epoch, images[rows], labels[rows], positions
        )
        loss_fn = partial(step.loss, model, hyper, collections=("batch_stats", "intermediates"))

        def gradient(batch_stats, part):
            (loss, (updates, _)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch_stats, *part)
            return updates.get("batch_stats", {}), (_by_layer(updates["intermediates"]), jnp.isfinite(loss), grads)

        parts = step.split_parts(batch, config.optimizer.accumulate_steps)
        _, (outputs, loss, grads) = lax.scan(gradient, state.batch_stats, parts)
        grads = lax.pmean(jax.tree.map(lambda g: g.mean(0), grads), BATCH_AXIS)
        schedule = make_schedule(config.optimizer.schedule, hyper, steps_per_epoch)
        updates, opt_state = make_optimizer(config, hyper, schedule).update(grads, state.opt_state, state.params)
        found = {
            "images": jnp.isfinite(batch[0]).all(),
            "labels": ((batch[1] >= 0) & (batch[1] < num_classes)).all(),
            "outputs": outputs,
            "loss": loss,
            "gradients": _by_layer(grads),
            "averages": _by_layer(opt_state),
            "updates": _by_layer(optax.apply_updates(state.params, updates)),
        }
        return jax.tree.map(lambda good: lax.pmin(good.all().astype(jnp.int32), BATCH_AXIS) > 0, found)

    def sharded(state, hyper, seed, images, labels, order, i):
        data = BATCHES if images.ndim == 4 else EVERYWHERE
        specs = (EVERYWHERE, EVERYWHERE, EVERYWHERE, data, data, BATCHES, EVERYWHERE)
        run = jax.shard_map(examine, mesh=mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False)
        return run(state, hyper, seed, images, labels, order, i)

    return jax.jit(sharded)


def _by_layer(tree: Any) -> dict[str, Bool[Array, ""]]:
    """Whether all numbers of a layer are finite, in a tree that has the parameters' names somewhere in its paths."""
    layers: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = next((entry.key for entry in path if isinstance(getattr(entry, "key", None), str)), "")
        layers.setdefault(re.sub("_(kernel|bias)$", "", name), []).append(leaf)
    return {name: step.all_finite(leaves) for name, leaves in layers.items()}


def _check_shapes(train_steps: Callable, config: ConfigDict, num_classes: int, state: Any, arguments: tuple) -> None:
    """Raises RunError unless data, logits and state have the types and shapes that training relies on."""
    _, _, images, labels, order = arguments
    wanted: dict[str, tuple[Any, Any]] = {
        "images": (images, UInt8[Array, "*any 28 28"]),
        "labels": (labels, Int32[Array, "*any"]),
        "order": (order, Int32[Array, f"steps {config.batch_size}"]),
    }
    model = make_model(config.model, step.hyperparameters(config), num_classes)
    batch = jnp.zeros((config.batch_size, 28, 28))
    logits = jax.eval_shape(model.apply, state.variables(), batch)
    wanted["logits"] = (logits, Float32[jax.ShapeDtypeStruct, f"{config.batch_size} {num_classes}"])
    for name, (array, kind) in wanted.items():
        if not isinstance(array, kind):
            raise RunError(
                f"{name} are {array.dtype}{list(array.shape)}, where {kind.dtypes[0]}[{kind.dim_str}] is due"
            )
    after = dict(jax.tree_util.tree_flatten_with_path(jax.eval_shape(train_steps, state, *arguments, 0, 0)[0])[0])
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        new = after.get(path)
        if new is None or (new.shape, new.dtype) != (leaf.shape, leaf.dtype):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise RunError(f"a step makes {new} of {where}, which is {leaf.dtype}{list(leaf.shape)}")


def _wrongs(model: ConfigDict, found: dict[str, Any]) -> Iterator[str]:
    """All that went wrong, in words, in the order in which it is computed."""
    convolutional = [name for i in range(len(model.channels)) for name in (f"conv{i}", f"norm{i}")]
    layers = [*convolutional, *(f"dense{i}" for i in range(len(model.dense))), "logits", "logits_norm"]
    lower = "lower config.optimizer.learning_rate or set config.optimizer.clip_norm"
    if not found["labels"]:
        yield "a label is out of range: prepare the dataset anew"
    if not found["images"]:
        yield "an augmented image is not finite: look at config.augment"
    for name in layers:
        if not found["outputs"].get(name, True):
            yield f"the output of layer {name} is the first that is not finite: {lower}"
    if not found["loss"]:
        yield f"the loss is not finite, all layers' outputs are: {lower}"
    for name in reversed(layers):  # the order of the backward pass
        if not found["gradients"].get(name, True):
            yield f"the gradient of layer {name} is the first number that is not finite: {lower}"
    for name in layers:
        if not found["averages"].get(name, True):
            yield f"the optimizer's averages for layer {name} are the first numbers that are not finite: {lower}"
    for name in layers:
        if not found["updates"].get(name, True):
            yield f"the updated parameters of layer {name} are the first numbers that are not finite: {lower}"
