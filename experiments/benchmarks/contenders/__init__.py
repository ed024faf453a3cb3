"""Those whom the benchmark compares: one module a library, each training the network of `configs/classic.py`.

Every module has

- `make(task) -> train`, where `train(steps)` runs that many more steps, on the batches of `task.rows`, waits until they
  are done and gives their mean loss; steps come in multiples of `STEPS`;
- `describe() -> str`: versions, and for the project the device;

and those in `MEASURES_PRODUCTS` also `multiply(size, dtype) -> run`, where `run()` multiplies two square matrices and
waits for the product. Each contender lives in a process of its own (`__main__.py`), so that libraries do not disturb
each other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8

NAMES = {"project": "mnist_flax", "torch": "PyTorch", "keras": "Keras, TensorFlow", "flax": "plain Flax"}
MODULES = {"project": "project", "torch": "pytorch", "keras": "keras_tensorflow", "flax": "plain_flax"}
PACKAGES = {"torch": ["torch"], "keras": ["keras", "tensorflow"], "flax": ["flax"]}  # that the peers need
MEASURES_PRODUCTS = ("project", "torch")

# Several processes share a GPU, and a terminal.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# PyTorch takes memory from malloc in every operation. Unless glibc keeps what was freed, as the allocators do that
# PyTorch's tuning guide recommends, page faults take almost half of the time.
TORCH_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}

LEARNING_RATE = 1e-3  # of configs/classic.py
STEPS = 8  # lets Keras run several steps in one call

# Multiply-adds of one image, forward: convolutions 1-32 at 28 x 28 and 32-64 at 14 x 14, dense 3136-256 and 256-10.
_LAYERS = (28 * 28 * 9 * 32, 14 * 14 * 9 * 32 * 64, 3136 * 256, 256 * 10)
# Training: forward, gradient of the weights, gradient of the input (which nobody needs of the first layer).
FLOPS_PER_IMAGE = 2 * (3 * sum(_LAYERS) - _LAYERS[0])


@dataclass(frozen=True)
class Task:
    """What a contender is given."""

    dtype: str  # bfloat16 or float32: of activations and products; parameters are float32
    batch_size: int
    images: UInt8[np.ndarray, "n 28 28"]
    labels: Int32[np.ndarray, " n"]
    batch_norm: bool = False  # after each convolution, which then has no bias

    def rows(self, step: int, steps: int) -> Int32[np.ndarray, "steps batch"]:
        """Which examples the `steps` batches from `step` on are made of: the order of the project's own runs."""
        from mnist_flax.data.datasets import epoch_order

        examples = len(self.labels)
        per_epoch = examples // self.batch_size
        first, last = step // per_epoch, (step + steps - 1) // per_epoch
        epochs = [epoch_order(0, epoch, examples, self.batch_size) for epoch in range(first, last + 1)]
        start = step - first * per_epoch
        return np.concatenate(epochs)[start : start + steps]


def peak_flops(multiply: Callable[[int, str], Callable[[], None]], dtype: str) -> float:
    """Most floating-point operations a second in products of square matrices, larger ones until one takes 20 ms."""
    size, seconds, best = 512, 0.0, 0.0
    while seconds < 0.02:
        size *= 2
        run = multiply(size, dtype)
        for _ in range(4):  # the first one may compile
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            best = max(best, 2 * size**3 / seconds)
    return best
