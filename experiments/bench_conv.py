"""Times layers, forward and backward, by implementation and by tile size: what `conv.py` chooses is checked here.

    python -m experiments.bench_conv [--dtype=bfloat16] [--batch=128]

Every product layer runs inside a compiled loop, as in training; `lax` outside, since XLA's CPU backend runs
convolutions in loops far slower still. Times are medians of runs taken in turns, in ms for one layer.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from mnist_flax.ops import conv, matmul_conv
from mnist_flax.runtime import cli, devices

_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the activations")
_BATCH = flags.DEFINE_integer("batch", 128, "examples", lower_bound=1)

# name: input side, input channels, kernel size, features, pooling
LAYERS = {
    "classic 1": (28, 1, 3, 32, 2),
    "classic 2": (14, 32, 3, 64, 2),
    "3x3, no pooling": (26, 32, 3, 32, 1),
    "5x5, no pooling": (12, 32, 5, 32, 1),
}
TILES = [2**20, 2**22, 2**23, 2**24, 2**30]  # bytes
LOOPS, ROUNDS = 4, 7


def make_run(name: str, impl: conv.Implementation, inputs: tuple) -> Callable[[], object]:
    """A compiled function of no arguments that runs a layer LOOPS times, on `(kernel, bias, x)`."""
    _, channels, _, _, pool_size = LAYERS[name]
    wanted = 2 if channels == 1 else 3  # training does not need the gradient of the images

    def loss(kernel, bias, x):
        y = conv.conv_bias_relu_pool(x, kernel, bias, padding="SAME", pool_size=pool_size, impl=impl)
        return (y.astype(jnp.float32) ** 2).sum()

    def step(inputs):  # descends, so that every step depends on the last
        gradients = jax.grad(loss, tuple(range(wanted)))(*inputs)
        moved = [a - (1e-6 * d).astype(a.dtype) for a, d in zip(inputs, gradients, strict=False)]
        return (*moved, *inputs[wanted:])

    if impl == "lax":
        run = jax.jit(step)
        run(inputs)
        return lambda: [run(inputs) for _ in range(LOOPS)]
    looped = jax.jit(lambda inputs: lax.fori_loop(0, LOOPS, lambda _, inputs: step(inputs), inputs))
    looped(inputs)
    return partial(looped, inputs)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: see --help")
    devices.available()
    rng = np.random.default_rng(0)
    print(f"{'':16}{'lax':>9}" + "".join(f"{f'{tile / 2**20:g} MB':>9}" for tile in TILES))
    for name, (side, channels, size, features, *_) in LAYERS.items():
        images = jnp.asarray(rng.standard_normal((_BATCH.value, side, side, channels)), _DTYPE.value)
        kernel = jnp.asarray(rng.standard_normal((size, size, channels, features)), jnp.float32)
        parameters = (kernel, jnp.zeros(features))
        runs = [make_run(name, "lax", (*parameters, images))]
        for tile in TILES:
            matmul_conv.TILE_BYTES = tile
            runs.append(make_run(name, "matmul", (*parameters, conv.to_internal(images, "matmul"))))
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(ROUNDS):
            for times, run in zip(seconds, runs, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run())
                times.append((time.perf_counter() - start) / LOOPS)
        print(f"{name:16}" + "".join(f"{1e3 * np.median(times):9.2f}" for times in seconds), flush=True)


if __name__ == "__main__":
    cli.run(main)
