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

from mnist_flax.models.cnn import CNN, Ensemble, mean_logits, normalize

Parameters = Any  # a mapping, named as the params of a `cnn.CNN` without batch norm; of an ensemble, a list of them


def fold_batch_norm(network: CNN | Ensemble, variables: Mapping[str, Any]) -> Parameters:
    """Parameters that give a network without batch norm the logits of the one with it.

    At inference a norm is an affine map a channel, y = s (x - mean) + shift with s = scale / sqrt(variance + epsilon),
    so that the layer before it takes over: its kernel times s, and s (bias - mean) + shift for bias (Jacob et al.
    2018, section 3.2). Computed in float64, returned in float32.

    Args:
      network: `model` of the run that `load_run` gives.
      variables: {"params", "batch_stats"} likewise.
    """
    if isinstance(network, Ensemble):
        return [fold_batch_norm(*each) for each in zip(network.members, network.split(variables), strict=True)]
    params, stats = variables["params"], variables.get("batch_stats", {})
    folded: dict[str, Any] = {f"dense{i}": params[f"dense{i}"] for i in range(len(network.dense))}
    for i in range(len(network.channels)):
        kernel, bias = params[f"conv{i}_kernel"], params.get(f"conv{i}_bias", 0.0)
        if network.batch_norm:
            kernel, bias = _fold(kernel, bias, params[f"norm{i}"], stats[f"norm{i}"])
        folded |= {f"conv{i}_kernel": kernel, f"conv{i}_bias": bias}
    kernel, bias = params["logits"]["kernel"], params["logits"]["bias"]
    if network.logits_batch_norm:
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
    network: CNN | Ensemble, parameters: Parameters, images: UInt8[Array, "batch 28 28"]
) -> Float[Array, "batch classes"]:
    """Class probabilities of images as pixels 0..255, in float32.

    The members of an ensemble follow each other without a loop, which not every runtime has.

    Args:
      network: what gives padding, pooling and head.
      parameters: what `fold_batch_norm` returns for it.
    """
    if isinstance(network, Ensemble):
        each = [probabilities(*member, images) for member in zip(network.members, parameters, strict=True)]
        return sum(each[1:], start=each[0]) / len(each)
    return jax.nn.softmax(activations(network, parameters, normalize(images))["logits"])


def activations(
    network: CNN | Ensemble, parameters: Parameters, images: Float[Array, "batch 28 28"]
) -> dict[str, Array]:
    """What each layer makes of images in [0, 1], in order.

    Returns:
      `conv0`, ... after ReLU and pooling [batch, height, width, channels]; `dense0`, ... after ReLU
      [batch, features]; and `logits` [batch, classes]. Of an ensemble, the layers of its first member, and the logits
      of all together.
    """
    if isinstance(network, Ensemble):
        logits = mean_logits(lambda net, part: activations(net, part, images)["logits"], network.members, parameters)
        return activations(network.members[0], parameters[0], images) | {"logits": logits}
    found = {}
    x = images.reshape(images.shape[0], 28, 28, 1)
    for i, size in enumerate(network.pool_sizes):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, parameters[f"conv{i}_kernel"], (1, 1), network.padding, dimension_numbers=numbers
        )
        x = jax.nn.relu(x + parameters[f"conv{i}_bias"])
        if size > 1:
            x = nn.max_pool(x, window_shape=(size, size), strides=(size, size))
        found[f"conv{i}"] = x
    if network.head == "average":
        x = nn.avg_pool(x, window_shape=x.shape[1:3])
    x = x.reshape(x.shape[0], -1)
    for i in range(len(network.dense)):
        x = found[f"dense{i}"] = jax.nn.relu(_dense(x, parameters[f"dense{i}"]))
    return found | {"logits": _dense(x, parameters["logits"])}


def _dense(x: Float[Array, "batch features"], layer: Mapping[str, Any]) -> Float[Array, "batch outputs"]:
    return jnp.dot(x, layer["kernel"]) + layer["bias"]
