"""Keras 3 on TensorFlow: mixed_bfloat16 or float32, and Keras's own train function, several steps a call.

Pooling comes before the ReLU, which gives the same and costs less. Keras decides itself whether XLA compiles the step.
"""

import os
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "tensorflow"
import keras
import tensorflow as tf

from mnist_flax.experiments.benchmarks.contenders import LEARNING_RATE, STEPS, Task


def describe() -> str:
    return f"keras {keras.__version__}, tensorflow {tf.__version__}"


def _network(batch_norm: bool) -> keras.Model:
    layers = keras.layers

    def convolution(outputs: int) -> list[keras.Layer]:
        norm = [layers.BatchNormalization()] if batch_norm else []
        convolved = layers.Conv2D(outputs, 3, padding="same", use_bias=not batch_norm)
        return [convolved, *norm, layers.MaxPooling2D(2), layers.ReLU()]

    dense = (layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(10, dtype="float32"))
    return keras.Sequential([keras.Input((28, 28, 1)), *convolution(32), *convolution(64), *dense])


def make(task: Task) -> Callable[[int], float]:
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if task.dtype == "bfloat16" else "float32")
    model = _network(task.batch_norm)
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=STEPS,
    )
    images, labels = tf.constant(task.images[..., None]), tf.constant(task.labels)

    def all_rows():
        step = 0
        while True:
            yield from task.rows(step, STEPS)
            step += STEPS

    def batch(rows):
        return tf.cast(tf.gather(images, rows), tf.float32) / 255, tf.gather(labels, rows)

    rows = tf.data.Dataset.from_generator(all_rows, output_signature=tf.TensorSpec((task.batch_size,), tf.int32))
    # `fit` calls the same function, but would begin a new pass over the data in every burst.
    batches = iter(rows.map(batch).prefetch(2 * STEPS))
    model.make_train_function()

    def train(steps: int) -> float:
        model.reset_metrics()
        for _ in range(steps // STEPS):
            logs = model.train_function(batches)
        return float(logs["loss"])  # waits

    return train
