"""The project: the compiled steps that `mnist_flax.main` runs, fed by the feed `device`."""

import os
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mnist_flax.configs import classic
from mnist_flax.data import datasets
from mnist_flax.data.feed import make_feed
from mnist_flax.experiments.benchmarks.contenders import Task
from mnist_flax.runtime import devices
from mnist_flax.training.state import hyperparameters, init_state
from mnist_flax.training.step import make_train_steps


def describe() -> str:
    device = devices.describe(devices.make_mesh())
    versions = f"jax {metadata.version('jax')}, flax {metadata.version('flax')}"
    return f"{versions}, on {device['count']} x {device['kind']}, {os.cpu_count()} CPU cores"


def make(task: Task) -> Callable[[int], float]:
    config = classic.get_config()
    config.model.compute_dtype = task.dtype
    config.model.batch_norm = task.batch_norm
    config.batch_size = task.batch_size
    devices.keep_compiled_programs()
    mesh = devices.make_mesh()
    split = datasets.Split(task.images, task.labels)
    feed = make_feed(config, datasets.Splits(split, split, split, np.arange(len(task.labels))), mesh, 0)
    hyper = hyperparameters(config)
    train_steps = make_train_steps(config, 10, len(task.labels) // task.batch_size, mesh)
    init = jax.jit(lambda seed: init_state(config, 10, seed), out_shardings=NamedSharding(mesh, P()))
    state = init(config.seed)
    state, last = train_steps(state, hyper, config.seed, feed(0, 1)._replace(stop=0))  # compiles, runs no step
    step = 0

    def run(steps: int) -> float:
        nonlocal state, last, step
        stop, read = step + steps, [(last, 1)]
        while step < stop:
            block = feed(step, stop - step)
            state, last = train_steps(state, hyper, config.seed, block)
            read.append((last, block.start))
            step += block.stop - block.start
        sums = [(jax.device_get(metrics["sums"]), start) for metrics, start in read]
        # They run from the start of an epoch, where no call goes on from the one before.
        losses = (now.loss - (before.loss if start else 0) for (before, _), (now, start) in pairwise(sums))
        return float(sum(losses)) / (steps * task.batch_size)

    return run


def multiply(size: int, dtype: str) -> Callable[[], None]:
    matrix = jnp.full((size, size), 0.01, dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: jax.block_until_ready(product(matrix, matrix))
