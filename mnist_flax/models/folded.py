"""The inference form of a network, for export, explanation and answers: batch norm is folded into the kernels."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from mnist_flax.models.cnn import CNN, Ensemble, Images, join

Network = Any  # CNN, Ensemble, or any Linen module that maps images [n, height, width, 1] to logits [n, classes]


def fold_batch_norm(network: Network, variables: Mapping[str, Any]) -> tuple[Network, dict[str, Any]]:
    """The network without batch norm, in float32 and plain `lax` convolution, and variables that give the same logits.

    At inference a norm is an affine map a channel, y = s (x - mean) + shift with s = scale / sqrt(variance + epsilon),
    so that the layer before it takes over: its kernel times s, and s (bias - mean) + shift for bias (Jacob et al.
    2018, section 3.2). Computed in float64, returned in float32.

    Members of an `Ensemble` are folded one by one. Modules other than `CNN` are returned as they are.
    """
    if isinstance(network, Ensemble):
        pairs = [fold_batch_norm(*each) for each in zip(network.members, network.split(variables), strict=True)]
        networks, parts = zip(*pairs, strict=True)
        return Ensemble(networks), join(parts)
    if not isinstance(network, CNN):
        return network, dict(variables)
    params, stats = dict(variables["params"]), variables.get("batch_stats", {})
    for i in range(len(network.channels) if network.batch_norm else 0):
        kernel, norm = params[f"conv{i}_kernel"], params.pop(f"norm{i}")
        params[f"conv{i}_kernel"], params[f"conv{i}_bias"] = _fold(kernel, 0.0, norm, stats[f"norm{i}"])
    if network.logits_batch_norm:
        norm = params.pop("logits_norm")
        kernel, bias = _fold(params["logits"]["kernel"], params["logits"]["bias"], norm, stats["logits_norm"])
        params["logits"] = {"kernel": kernel, "bias": bias}
    float32 = np.dtype("float32")
    plain: CNN = network.clone(batch_norm=False, logits_batch_norm=False, compute_dtype=float32, impl="lax")
    return plain, {"params": jax.tree.map(lambda array: np.asarray(array, float32), params)}


def _fold(kernel, bias, norm: Mapping[str, Any], stats: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    kernel, bias, scale, shift, mean, variance = (
        np.asarray(array, np.float64)
        for array in (kernel, bias, norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(variance + nn.BatchNorm.epsilon)
    return kernel * factor, (bias - mean) * factor + shift


def features(network: Network, variables: Mapping[str, Any], images: Images) -> OrderedDict[str, Float[Array, "..."]]:
    """What each layer makes of images in [0, 1], by the path of its module, in the order of computation.

    Of a folded `CNN`: `conv0`, ... after ReLU and pooling [batch, height, width, channels]; `dense0`, ... after ReLU
    [batch, features]; and `logits`. Of another module, all that has either shape. Of an ensemble, those of its first
    member. (JAX sorts the names of a plain dictionary; those of an `OrderedDict` stay in order.)
    """
    if isinstance(network, Ensemble):
        network, variables = network.members[0], network.split(variables)[0]
    _, found = network.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
    return OrderedDict(
        (name.removesuffix("/__call__"), x)
        for name, outputs in flatten_dict(found["intermediates"], sep="/").items()
        for x in jax.tree.leaves(outputs)[-1:]  # of the last call
        if name != "__call__" and x.ndim in (2, 4) and len(x) == len(images)
    )
