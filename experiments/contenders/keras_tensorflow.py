"""Keras 3 on TensorFlow: mixed_bfloat16 or float32, its own train function, fed by a tf.data pipeline."""

import os
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "tensorflow"
import keras
import tensorflow as tf

from experiments.contenders import LEARNING_RATE, Task


def describe() -> str:
    return f"keras {keras.__version__}, tensorflow {tf.__version__}"


def make(task: Task) -> Callable[[int], float]:
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if task.dtype == "bfloat16" else "float32")
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *(
                (
                    layers.Conv2D(32, 3, padding="same"),
                    layers.MaxPooling2D(2),
                    layers.ReLU(),
                    layers.Conv2D(64, 3, padding="same"),
                    layers.MaxPooling2D(2),
                    layers.ReLU(),
                )
                if os.environ.get("KR")
                else (
                    layers.Conv2D(32, 3, padding="same", activation="relu"),
                    layers.MaxPooling2D(2),
                    layers.Conv2D(64, 3, padding="same", activation="relu"),
                    layers.MaxPooling2D(2),
                )
            ),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(10, dtype="float32"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile={"": "auto", "0": False, "1": True}[os.environ.get("KJ", "")],
        steps_per_execution=int(os.environ.get("KS", "1")),
    )
    images, labels = tf.constant(task.images[..., None]), tf.constant(task.labels)

    def batch(rows):
        return tf.cast(tf.gather(images, rows), tf.float32) / 255, tf.gather(labels, rows)

    step = 0

    def all_rows():
        step = 0
        while True:
            yield from task.rows(step, 100)
            step += 100

    dataset = (
        tf.data.Dataset.from_generator(all_rows, output_signature=tf.TensorSpec((task.batch_size,), tf.int32))
        .map(batch)
        .prefetch(int(os.environ.get("KP", "2")))
    )
    iterator = iter(dataset)
    model.make_train_function()

    def train(steps: int) -> float:
        model.reset_metrics()
        for _ in range(steps // int(os.environ.get("KS", "1"))):
            logs = model.train_function(iterator)
        return float(logs["loss"])

    return train
