"""A trained network as one plain function from pixels to probabilities: the form in which it leaves the project.

What training needs is gone (batch norm is folded into the kernels, dropout away) and what a user of the file would
have to know is inside (scaling of the pixels, softmax). Only plain `lax` convolution and pooling are used, which
every compiler and converter knows.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from mnist_flax.config import per_layer
from mnist_flax.model import normalize

Parameters = Mapping[str, Any]  # named as those of a `model.CNN` without batch norm


def fold_batch_norm(config: ConfigDict, variables: Mapping[str, Any]) -> Parameters:
    """Parameters that give the network of `config.model` without batch norm the logits of the one with it.

    At inference a norm is an affine map a channel, y = s (x - mean) + shift with s = scale / sqrt(variance + epsilon),
    so that the layer before it takes over: its kernel times s, and s (bias - mean) + shift for bias (Jacob et al.
    2018, section 3.2). Computed in float64, returned in float32.

    Args:
      config: `config.model` of the run.
      variables: {"params", "batch_stats"} as `run.load_run` gives them.
    """
    params, stats = variables["params"], variables.get("batch_stats", {})
    folded: dict[str, Any] = {f"dense{i}": params[f"dense{i}"] for i in range(len(config.dense))}
    for i in range(len(config.channels)):
        kernel, bias = params[f"conv{i}_kernel"], params.get(f"conv{i}_bias", 0.0)
        if config.batch_norm:
            kernel, bias = _fold(kernel, bias, params[f"norm{i}"], stats[f"norm{i}"])
        folded |= {f"conv{i}_kernel": kernel, f"conv{i}_bias": bias}
    kernel, bias = params["logits"]["kernel"], params["logits"]["bias"]
    if config.logits_batch_norm:
        kernel, bias = _fold(kernel, bias, params["logits_norm"], stats["logits_norm"])
    folded["logits"] = {"kernel": kernel, "bias": bias}
    return jax.tree.map(lambda array: np.asarray(array, np.float32), folded)


def _fold(kernel, bias, norm: Mapping[str, Any], stats: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    kernel, bias, scale, shift, mean, variance = (
        np.asarray(array, np.float64)
        for array in (kernel, bias, norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(variance + nn.BatchNorm.epsilon)
    return kernel * factor, (bias - mean) * factor + shift


def probabilities(
    config: ConfigDict, parameters: Parameters, images: UInt8[Array, "batch 28 28"]
) -> Float[Array, "batch classes"]:
    """Class probabilities of images as pixels 0..255, in float32.

    Args:
      config: `config.model`, which gives strides, pooling and head.
      parameters: what `fold_batch_norm` returns for it.
    """
    return jax.nn.softmax(activations(config, parameters, normalize(images))["logits"])


def activations(config: ConfigDict, parameters: Parameters, images: Float[Array, "batch 28 28"]) -> dict[str, Array]:
    """What each layer makes of images in [0, 1], in order.

    Returns:
      `conv0`, ... after ReLU and pooling [batch, height, width, channels]; `dense0`, ... after ReLU
      [batch, features]; and `logits` [batch, classes].
    """
    layers = len(config.channels)
    found = {}
    x = images.reshape(images.shape[0], 28, 28, 1)
    for i, (stride, size) in enumerate(
        zip(per_layer(config.strides, layers), per_layer(config.pool_sizes, layers), strict=True)
    ):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, parameters[f"conv{i}_kernel"], (stride, stride), config.padding, dimension_numbers=numbers
        )
        x = jax.nn.relu(x + parameters[f"conv{i}_bias"])
        if size > 1:
            pool = nn.max_pool if config.pooling == "max" else nn.avg_pool
            x = pool(x, window_shape=(size, size), strides=(size, size))
        found[f"conv{i}"] = x
    if config.head == "average":
        x = nn.avg_pool(x, window_shape=x.shape[1:3])
    x = x.reshape(x.shape[0], -1)
    for i in range(len(config.dense)):
        x = found[f"dense{i}"] = jax.nn.relu(_dense(x, parameters[f"dense{i}"]))
    return found | {"logits": _dense(x, parameters["logits"])}


def _dense(x: Float[Array, "batch features"], layer: Mapping[str, Any]) -> Float[Array, "batch outputs"]:
    return jnp.dot(x, layer["kernel"]) + layer["bias"]
