"""A trained run as functions of images, in float32: logits, and what its layers make of them."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, UInt8

from mnist_flax.inference.run import Run
from mnist_flax.models import cnn, folded
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.settings import pinned

# A batch is padded to the next of these, so that few programs are compiled.
BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 2048)

Images = UInt8[np.ndarray, "n height width"] | Float[np.ndarray, "n height width"]


def check_images(images: np.ndarray, size: int) -> Images:
    """The images without their channel, as uint8, or as float32 in [0, 1].

    Raises:
      UserError: their type is neither, they are not within [0, 1], or their shape is not [n, size, size] or
        [n, size, size, 1].
    """
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim != 3 or images.shape[1:] != (size, size):
        raise UserError(
            f"images have the shape {list(images.shape)}: give [n, {size}, {size}] or [n, {size}, {size}, 1]"
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"images are {images.dtype}: give uint8 from 0 to 255, or floats from 0 to 1")
    if images.size and not (images.min() >= 0 and images.max() <= 1):  # nor NaN
        raise UserError(
            f"images range from {images.min():g} to {images.max():g}: give floats from 0 to 1, or uint8 from 0 to 255"
        )
    return images.astype(np.float32)


@pinned()
def make_logits(run: Run) -> Callable[[Images], Float[np.ndarray, "n classes"]]:
    """Logits of any number of images, computed in float32 in padded batches of `BATCH_SIZES`."""
    network, variables = folded.fold_batch_norm(run.model, run.variables)
    variables = jax.device_put(variables)
    compiled = jax.jit(lambda variables, images: network.apply(variables, _scaled(images)))

    @pinned()
    def logits(images: Images) -> Float[np.ndarray, "n classes"]:
        results = [np.zeros((0, len(run.class_names)), np.float32)]
        for start in range(0, len(images), BATCH_SIZES[-1]):
            part = images[start : start + BATCH_SIZES[-1]]
            results.append(np.asarray(compiled(variables, _padded(part)))[: len(part)])
        return np.concatenate(results)

    return logits


@pinned()
def make_features(run: Run) -> Callable[[Images], dict[str, Float[np.ndarray, "n ..."]]]:
    """What each layer makes of images, as one padded batch: see `folded.features`."""
    network, variables = folded.fold_batch_norm(run.model, run.variables)
    variables = jax.device_put(variables)
    compiled = jax.jit(lambda variables, images: folded.features(network, variables, _scaled(images)))

    @pinned()
    def features(images: Images) -> dict[str, Float[np.ndarray, "n ..."]]:
        found = compiled(variables, _padded(images))
        return {name: np.asarray(values)[: len(images)] for name, values in found.items()}

    return features


def _scaled(images):
    return (cnn.scale_pixels(images) if images.dtype == np.uint8 else images)[..., None]


def _padded(images: np.ndarray) -> np.ndarray:
    size = next((size for size in BATCH_SIZES if size >= len(images)), len(images))
    return np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
