"""Flax as its own MNIST example writes it: `nn.Conv`, `nn.max_pool`, and jitted functions called in a Python loop."""

from collections.abc import Callable
from importlib import metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from experiments.contenders import LEARNING_RATE, Task


class CNN(nn.Module):
    """The classic network in `dtype`."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, kernel_size=(3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(256, dtype=self.dtype)(x))
        return nn.Dense(10, dtype=self.dtype)(x).astype(jnp.float32)


@jax.jit
def apply_model(state, images, labels):
    """Gradients, loss and accuracy of a batch."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10)).mean(), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return grads, loss, jnp.mean(jnp.argmax(logits, -1) == labels)


@jax.jit
def update_model(state, grads):
    return state.apply_gradients(grads=grads)


def describe() -> str:
    return f"jax {metadata.version('jax')}, flax {metadata.version('flax')}"


def make(task: Task) -> Callable[[int], float]:
    images, labels = jnp.asarray(task.images[..., None], jnp.float32) / 255, jnp.asarray(task.labels)
    model = CNN(task.dtype)
    params = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(LEARNING_RATE))
    step = 0

    def train(steps: int) -> float:
        nonlocal state, step
        losses = []
        for rows in task.rows(step, steps):
            grads, loss, _ = apply_model(state, images[rows, ...], labels[rows, ...])
            state = update_model(state, grads)
            losses.append(loss)
        step += steps
        jax.block_until_ready(state)
        return float(jnp.mean(jnp.stack(losses)))

    return train
