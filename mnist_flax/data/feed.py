"""The two feeds: how batches reach the compiled steps. Same batches, same order, same parameters, bit for bit."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int32, UInt8
from ml_collections import ConfigDict

from mnist_flax.data import datasets
from mnist_flax.runtime.devices import BATCH_SHARDED, put


class Block(NamedTuple):
    """Batches on the devices: batch i is rows `order[i]` of the examples, and those from `start` to `stop` are due.

    Examples are the whole split, on every device ([examples, ...], feed `device`), or some batches, split over devices
    ([steps, batch, ...], feed `stream`, where `order` counts within a device's share).
    """

    images: UInt8[Array, "*examples height width"]
    labels: Int32[Array, "*examples"]
    order: Int32[Array, "steps batch"]
    start: int
    stop: int


Feed = Callable[[int, int], Block]  # of the step to go on from, and the most steps to take

_STREAM_STEPS = 16  # steps in a block of the stream: enough to hide the call, little to hold in memory


def make_feed(config: ConfigDict, splits: datasets.Splits, mesh: Mesh, first_step: int) -> Feed:
    """The feed that `config.feed` names; `first_step` is where training goes on."""
    if config.feed == "device":
        return _device_feed(config, splits, mesh)
    return _stream_feed(config, splits, mesh, first_step)


def _device_feed(config: ConfigDict, splits: datasets.Splits, mesh: Mesh) -> Feed:
    """The whole split lives on every device; an epoch's order goes there once an epoch.

    It is drawn while the epoch before is trained; a GPU was seen to wait for it, 9 ms an epoch.
    """
    images, labels = put(tuple(splits.train), mesh)
    examples = len(splits.train.labels)
    steps_per_epoch = examples // config.batch_size
    draw = partial(datasets.epoch_order, config.seed, num_examples=examples, batch_size=config.batch_size)
    thread = ThreadPoolExecutor(1)
    current: tuple[int, jax.Array] | None = None
    following: tuple[int, Future] | None = None

    def feed(step: int, limit: int):
        nonlocal current, following
        epoch, start = divmod(step, steps_per_epoch)
        if current is None or current[0] != epoch:
            order = following[1].result() if following and following[0] == epoch else draw(epoch)
            current = epoch, put(order, mesh, BATCH_SHARDED)
            following = epoch + 1, thread.submit(draw, epoch + 1)
        return Block(images, labels, current[1], start, min(start + limit, steps_per_epoch))

    return feed


def _stream_feed(config: ConfigDict, splits: datasets.Splits, mesh: Mesh, first_step: int) -> Feed:
    """Blocks of batches that Grain reads ahead, each process its own columns."""
    sharding = NamedSharding(mesh, BATCH_SHARDED)
    blocks: Iterator = datasets.stream(
        config, splits.train_indices, first_step, _STREAM_STEPS, jax.process_index(), jax.process_count()
    )
    # Where a device finds row i of its share of a block: the share is laid out as [steps, batch / devices].
    share = config.batch_size // mesh.size
    rows = np.arange(_STREAM_STEPS)[:, None] * share + np.arange(config.batch_size)[None, :] % share
    order = put(rows.astype(np.int32), mesh, BATCH_SHARDED)

    def feed(step: int, limit: int):
        images, labels = next(blocks)
        steps = len(labels)
        padding = (0, _STREAM_STEPS - steps), (0, 0)  # one shape for all blocks, so that nothing compiles anew
        images = jax.make_array_from_process_local_data(sharding, np.pad(images, (*padding, (0, 0), (0, 0))))
        labels = jax.make_array_from_process_local_data(sharding, np.pad(labels, padding))
        return Block(images, labels, order, 0, steps)

    return feed
