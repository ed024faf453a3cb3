"""Test-time augmentation: a network that looks at each image several times, moved a little."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mnist_flax.models.cnn import CNN, Ensemble
from mnist_flax.ops.random import make_key
from mnist_flax.runtime import cli
from mnist_flax.training.augment import MOVES, augment


class TestTimeAugmentation(NamedTuple):
    """Answers with the mean of a network's class probabilities over moved copies (Krizhevsky et al. 2012, section 4.1).

    All images are moved alike in a view, so that what an image is read as depends on no other.
    """

    network: CNN | Ensemble
    strength: Mapping[str, float]  # what `augment` takes
    copies: int

    def apply(self, variables: Mapping[str, Any], images: Float[Array, "batch height width"]) -> Array:
        """Logits [batch, classes] of images in [0, 1]: the logarithm of the mean of the probabilities."""

        def log_probabilities(view):
            key = random.fold_in(make_key(0), view)
            moved = augment(jnp.broadcast_to(key, len(images)), images, self.strength)
            logits: Any = self.network.apply(variables, moved)
            return jax.nn.log_softmax(logits)

        answer = jax.eval_shape(log_probabilities, 0)
        nothing = jnp.full(answer.shape, -jnp.inf, answer.dtype)
        # Added up one by one: all of them would not fit into memory where there are many.
        total = lax.fori_loop(0, self.copies, lambda i, total: jnp.logaddexp(total, log_probabilities(i)), nothing)
        return total - jnp.log(self.copies)


def make_tta(network: CNN | Ensemble, config: ConfigDict, copies: int) -> TestTimeAugmentation:
    """`copies` views, moved by `augment.final_scale` of what the network was trained with, as a gentle end is.

    Raises:
      UserError: it was trained without moving images, or with a scale of 0.
    """
    fields = config.augment
    strength = {kind: fields.final_scale * fields[kind] for kind in MOVES if fields.final_scale * fields[kind]}
    if not strength:
        raise cli.UserError(
            "views are moved by config.augment.final_scale of what training did, which is nothing in this run: "
            "leave them out"
        )
    return TestTimeAugmentation(network, strength, copies)
