"""Why a network answers as it does, of one image: what its layers find, and which pixels mattered."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8

from mnist_flax.inference.run import Run
from mnist_flax.runtime.settings import pinned

PATCH, STEP = 5, 2  # pixels: side of what is covered at a time, and how far it moves


class Explanation(NamedTuple):
    """What speaks for a class, and how. Log-odds are in nats, of the calibrated probability of the class.

    Both maps are of pixels: positive where ink speaks for the class.
    """

    layers: dict[str, Float[np.ndarray, "*features"]]  # see `folded.features`, without the batch
    gradient: Float[np.ndarray, "28 28"]  # log-odds a pixel's whole range, for a little more ink
    occlusion: Float[np.ndarray, "28 28"]  # log-odds lost when the ink around a pixel is covered


@pinned()
def make_explain(run: Run, temperature: float) -> Callable[[UInt8[np.ndarray, "28 28"], int], Explanation]:
    """A compiled function that explains the probability of a class for an image, 255 being ink.

    The gradient is that of Simonyan et al. 2014. Occlusion (Zeiler and Fergus 2014) covers `PATCH` x `PATCH` pixels
    with paper, in steps of `STEP`; a pixel's value is the mean over the patches that cover it. Both are of all members
    of an ensemble.
    """
    import jax
    import jax.numpy as jnp

    from mnist_flax.models import cnn, folded

    network, variables = folded.fold_batch_norm(run.model, run.variables)
    variables = jax.device_put(variables)
    patches = _patches()
    covering = patches.sum(axis=0)

    def log_odds(variables, images: Float[Array, "batch 28 28"], target) -> Float[Array, " batch"]:
        logits = network.apply(variables, images[..., None]) / temperature
        others = jnp.where(jnp.arange(logits.shape[1]) == target, -jnp.inf, logits)
        return logits[:, target] - jax.nn.logsumexp(others, axis=1)

    @jax.jit
    def compiled(variables, pixels, target):
        image = cnn.scale_pixels(pixels)
        gradient = jax.grad(lambda image: log_odds(variables, image[None], target)[0])(image)
        variants = jnp.concatenate([image[None], image * ~patches])
        odds = log_odds(variables, variants, target)
        lost = jnp.tensordot(odds[0] - odds[1:], patches.astype(np.float32), 1) / covering
        layers = folded.features(network, variables, image[None, ..., None])
        return jax.tree.map(lambda x: x[0], layers), gradient, lost

    @pinned()
    def explain(image: UInt8[np.ndarray, "28 28"], target: int) -> Explanation:
        return Explanation(*jax.device_get(compiled(variables, image, np.int32(target))))

    return explain


def _patches() -> np.ndarray:
    """Boolean [patches, 28, 28]: what is covered each time; every pixel is covered at least once."""
    position = np.arange(28)
    starts = np.arange(1 - PATCH + STEP, 28, STEP)
    within = (position >= starts[:, None]) & (position < starts[:, None] + PATCH)
    return (within[:, None, :, None] & within[None, :, None, :]).reshape(-1, 28, 28)
