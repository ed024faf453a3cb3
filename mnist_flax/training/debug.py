"""Debug mode: types and shapes are checked before the first step, and numbers after each one.

The compiled steps are those of any other run, called one at a time, so what is found is what happened. Where a number
is not finite the step is done again with all that lies between the batch and the new parameters looked at, in order.
(`jax.debug_nans` would name a primitive, not a layer, and cannot look into compiled loops.)
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32, UInt8
from ml_collections import ConfigDict

from mnist_flax.data.feed import Block
from mnist_flax.models.cnn import make_model
from mnist_flax.runtime.cli import RunError
from mnist_flax.runtime.devices import BATCH_AXIS
from mnist_flax.training.state import TrainState, all_finite, hyperparameters
from mnist_flax.training.step import make_train_step, over_devices, take_batch


def checked(train_steps: Callable, config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Callable:
    """`train_steps` of `step.make_train_steps`, with every step checked.

    What it returns raises RunError where types or shapes are not what they should be, or a number is not finite: one
    line that names the layer.
    """
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    finite = jax.jit(all_finite)
    examine = make_examination(config, num_classes, steps_per_epoch, mesh)

    def steps(state, hyper, seed, block: Block):
        if block.start == block.stop:  # the call that compiles
            _check_shapes(train_steps, config, num_classes, state, hyper, seed, block)
            return train_steps(state, hyper, seed, block)
        for i in range(block.start, block.stop):
            before = copy(state)  # the step takes the state away
            only = block._replace(start=i, stop=i + 1)
            state, last = train_steps(state, hyper, seed, only)
            if not finite((state, last["sums"].loss)):
                found = jax.device_get(examine(before, hyper, seed, only))
                step, epoch = int(last["step"]), int(before.step) // steps_per_epoch + 1
                what = next(_wrongs(config.model, found), "a number is not finite, and was finite when computed again")
                raise RunError(f"step {step}, in epoch {epoch}: {what}; what was saved before is kept")
        return state, last

    return steps


def make_examination(config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Callable:
    """`examine(state, hyper, seed, block)`: the step of batch `block.start`, as whether each value is good.

    Gives {"images", "labels", "loss"} and, by the names of the layers, {"outputs", "gradients", "averages", "params"}.
    """

    def is_good(name: str, value: Any) -> Any:
        if name == "labels":
            return (value >= 0) & (value < num_classes)
        return jnp.isfinite(value) if name in ("images", "loss") else _by_layer(value)

    train_step = make_train_step(config, num_classes, steps_per_epoch, probe=is_good)

    def examine(state, hyper, seed, block: Block):
        _, found = train_step(state, hyper, seed, take_batch(block, block.start))
        return jax.tree.map(lambda good: lax.pmin(good.all().astype(jnp.int32), BATCH_AXIS) > 0, found)

    return jax.jit(over_devices(examine, mesh))


def _by_layer(tree: Any) -> dict[str, Bool[Array, ""]]:
    """Whether all numbers of a layer are finite, in a tree that has the parameters' names somewhere in its paths."""
    layers: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = next((entry.key for entry in path if isinstance(getattr(entry, "key", None), str)), "")
        layers.setdefault(re.sub("_(kernel|bias)$", "", name), []).append(leaf)
    return {name: all_finite(leaves) for name, leaves in layers.items()}


def _check_shapes(
    train_steps: Callable, config: ConfigDict, num_classes: int, state: TrainState, hyper: Any, seed: int, block: Block
) -> None:
    """Raises RunError unless data, logits and state have the types and shapes that training relies on."""
    wanted: dict[str, tuple[Any, Any]] = {
        "images": (block.images, UInt8[Array, "*any 28 28"]),
        "labels": (block.labels, Int32[Array, "*any"]),
        "order": (block.order, Int32[Array, f"steps {config.batch_size}"]),
    }
    model = make_model(config.model, hyperparameters(config), num_classes)
    batch = jnp.zeros((config.batch_size, 28, 28))
    logits = jax.eval_shape(model.apply, state.variables(), batch)
    wanted["logits"] = (logits, Float32[jax.ShapeDtypeStruct, f"{config.batch_size} {num_classes}"])
    for name, (array, kind) in wanted.items():
        if not isinstance(array, kind):
            raise RunError(
                f"{name} are {array.dtype}{list(array.shape)}, where {kind.dtypes[0]}[{kind.dim_str}] is due"
            )
    after = dict(jax.tree_util.tree_flatten_with_path(jax.eval_shape(train_steps, state, hyper, seed, block)[0])[0])
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
        if not found["params"].get(name, True):
            yield f"the updated parameters of layer {name} are the first numbers that are not finite: {lower}"
