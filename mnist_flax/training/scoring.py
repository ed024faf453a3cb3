"""Loss, accuracy and logits of a whole split, on any number of devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from mnist_flax.data import datasets
from mnist_flax.models.cnn import scale_pixels
from mnist_flax.runtime.devices import BATCH_AXIS, BATCH_SHARDED, REPLICATED, make_mesh, put
from mnist_flax.runtime.settings import pinned
from mnist_flax.training.loss import cross_entropy


class Network(Protocol):
    """What is scored: a Flax module, or several networks that answer together."""

    def apply(self, variables: Any, images: Any) -> Any:
        """Logits [batch, classes] of images in [0, 1]."""


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
    return put((images, labels), mesh, BATCH_SHARDED)


def evaluate_batches(
    model: Network, variables: dict, images, labels
) -> tuple[dict, Float[Array, "batches share classes"]]:
    """Mean loss and accuracy over a whole split, and this device's logits: see `make_evaluate`; within `BATCH_AXIS`."""
    logits = lax.map(lambda batch: model.apply(variables, scale_pixels(batch)), images)
    real = labels >= 0
    loss = jnp.where(real, cross_entropy(logits, jnp.maximum(labels, 0)), 0).sum()
    correct = (real & (logits.argmax(-1) == labels)).sum()
    loss, correct, count = lax.psum((loss, correct, real.sum()), BATCH_AXIS)
    return {"loss": loss / count, "accuracy": correct / count}, logits


def make_evaluate(model: Network, mesh: Mesh) -> Callable:
    """Whole-split evaluation: `(variables, images, labels) -> ({"loss", "accuracy"}, logits)` of `split_batches`.

    Loss is the mean cross-entropy and accuracy the fraction correct over exactly the examples that are not padding.
    Logits are float32 [batches, batch, classes], padding included, whole on every device.
    """
    evaluate = jax.shard_map(
        partial(evaluate_batches, model),
        mesh=mesh,
        in_specs=(REPLICATED, BATCH_SHARDED, BATCH_SHARDED),
        out_specs=(REPLICATED, BATCH_SHARDED),
        check_vma=False,
    )
    return pinned()(jax.jit(evaluate, out_shardings=NamedSharding(mesh, REPLICATED)))


def make_logits(
    model: Network, batch_size: int, mesh: Mesh | None = None
) -> Callable[[dict, datasets.Split], Float[np.ndarray, "examples classes"]]:
    """`logits(variables, split)`: those of every example of a split: nothing is dropped and nothing counted twice.

    Evaluated a padded batch of `batch_size` at a time, so that it compiles once for splits of any size, on the devices
    of `mesh`, by default all.
    """
    mesh = make_mesh() if mesh is None else mesh
    evaluate = make_evaluate(model, mesh)

    @pinned()
    def logits(variables: dict, split: datasets.Split) -> Float[np.ndarray, "examples classes"]:
        found = []
        for start in range(0, len(split.labels), batch_size):
            images, labels = (array[start : start + batch_size] for array in split)
            batch = split_batches(mesh, images, labels, batch_size)
            found.append(np.asarray(evaluate(variables, *batch)[1][0])[: len(labels)])
        return np.concatenate(found)

    return logits
