"""Flax as its own MNIST example writes it: `nn.Conv`, `nn.max_pool`, and jitted functions called in a Python loop."""

from collections.abc import Callable
from importlib import metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from mnist_flax.experiments.benchmarks.contenders import LEARNING_RATE, Task


class CNN(nn.Module):
    """The classic network in `dtype`, in training mode."""

    dtype: str
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for features in (32, 64):
            x = nn.Conv(features, kernel_size=(3, 3), use_bias=not self.batch_norm, dtype=self.dtype)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
            x = nn.relu(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(256, dtype=self.dtype)(x))
        return nn.Dense(10, dtype=self.dtype)(x).astype(jnp.float32)


class State(TrainState):
    batch_stats: dict


@jax.jit
def apply_model(state, images, labels):
    """Gradients, loss and accuracy of a batch, and the norms' averages after it."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10)).mean(), (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return grads, loss, jnp.mean(jnp.argmax(logits, -1) == labels), updates.get("batch_stats", {})


@jax.jit
def update_model(state, grads, batch_stats):
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


def describe() -> str:
    return f"jax {metadata.version('jax')}, flax {metadata.version('flax')}"


def make(task: Task) -> Callable[[int], float]:
    images, labels = jnp.asarray(task.images[..., None], jnp.float32) / 255, jnp.asarray(task.labels)
    model = CNN(task.dtype, task.batch_norm)
    variables = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    state = State.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=optax.adam(LEARNING_RATE),
    )
    step = 0

    def train(steps: int) -> float:
        nonlocal state, step
        losses = []
        for rows in task.rows(step, steps):
            grads, loss, _, batch_stats = apply_model(state, images[rows, ...], labels[rows, ...])
            state = update_model(state, grads, batch_stats)
            losses.append(loss)
        step += steps
        jax.block_until_ready(state)
        return float(jnp.mean(jnp.stack(losses)))

    return train
