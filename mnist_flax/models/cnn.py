"""The convolutional network: the only file that defines Linen modules.

How a convolution is computed, and in which layout, is `conv.py`'s business: `impl` only passes through here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from mnist_flax.ops import conv
from mnist_flax.ops.random import random_bytes
from mnist_flax.runtime.config import per_layer
from mnist_flax.runtime.devices import default_dtype

Images = Float[Array, "batch height width"] | Float[Array, "batch height width 1"]

_he_normal = nn.initializers.he_normal()  # He et al. 2015, for layers that a ReLU follows


class CNN(nn.Module):
    """Convolutional layers (convolution, batch norm, ReLU, maxima), hidden dense layers with dropout, logits.

    Fields are those of `config.model`. The rate may be traced; whether there is dropout at all may not.
    """

    num_classes: int
    channels: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    pool_sizes: tuple[int, ...]
    padding: str
    batch_norm: bool
    batch_norm_momentum: Any
    logits_batch_norm: bool
    head: str
    dense: tuple[int, ...]
    dropout_rate: Any  # None is no dropout
    compute_dtype: jnp.dtype
    impl: conv.Implementation
    batch_axis: str | None = None  # mesh axis over which batch norm averages

    @nn.compact
    def __call__(
        self, images: Images, *, dropout_keys: Key[Array, " batch"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits in float32 of images in [0, 1]. With `dropout_keys`, one an example, in training mode.

        Raises:
          TypeError: `images` are integers.
          ValueError: `images` have another shape.
        """
        train = dropout_keys is not None
        channel_axis = conv.CHANNEL_AXIS[self.impl]
        x = conv.to_internal(_with_channel(images).astype(self.compute_dtype), self.impl)
        for i, (features, kernel_size, pool_size) in enumerate(
            zip(self.channels, self.kernel_sizes, self.pool_sizes, strict=True)
        ):
            in_features = x.shape[channel_axis]
            shape = (kernel_size, kernel_size, in_features, features)
            kernel = self.param(f"conv{i}_kernel", _he_normal, shape)
            if self.batch_norm:
                x = conv.conv(x, kernel, padding=self.padding, impl=self.impl)
                self.sow("intermediates", f"conv{i}", x)  # as `nn.Dense` is captured: nothing, unless asked for
                x = BatchNorm(self.batch_norm_momentum, self.batch_axis, self.impl, name=f"norm{i}")(x, train)
                x = conv.relu_pool(x, pool_size, self.impl)
            else:
                bias = self.param(f"conv{i}_bias", nn.initializers.zeros, (features,))
                x = conv.conv_bias_relu_pool(x, kernel, bias, padding=self.padding, pool_size=pool_size, impl=self.impl)
                self.sow("intermediates", f"conv{i}", x)

        x = conv.from_internal(x, self.impl).mean((1, 2)) if self.head == "average" else conv.flatten(x, self.impl)
        dot_general = partial(conv.dense, impl=self.impl)
        for i, features in enumerate(self.dense):
            x = DenseRelu(features, dtype=self.compute_dtype, dot_general=dot_general, name=f"dense{i}")(x)
            if dropout_keys is not None and self.dropout_rate is not None:
                layer = len(self.channels) + 1 + i  # not i: what a recipe gives would change
                x = drop(jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, layer), x, self.dropout_rate)
        # In float32, since bfloat16 would decide near ties.
        x = nn.Dense(self.num_classes, dtype=jnp.float32, dot_general=dot_general, name="logits")(x)
        if self.logits_batch_norm:
            axis_name = self.batch_axis if train else None
            norm = nn.BatchNorm(not train, momentum=self.batch_norm_momentum, axis_name=axis_name, name="logits_norm")
            x = norm(x)
        return x


def _with_channel(images: Images) -> Float[Array, "batch height width 1"]:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images are {images.dtype}, not floats in [0, 1]: divide pixels 0..255 by 255, or use run.predict"
        )
    if images.ndim == 3:
        return images[..., None]
    if images.ndim != 4 or images.shape[3] != 1:
        raise ValueError(f"images have shape {images.shape}: give [n, height, width] or [n, height, width, 1]")
    return images


class DenseRelu(nn.Dense):
    """`nn.Dense` and its ReLU as one module, whose captured output is the activation."""

    kernel_init: nn.initializers.Initializer = _he_normal

    def __call__(self, x: Float[Array, "batch in_features"]) -> Float[Array, "batch features"]:
        return nn.relu(super().__call__(x))


class BatchNorm(nn.Module):
    """`nn.BatchNorm` of a convolution's output, computed by `conv.py`; the variables have the same names."""

    momentum: Any
    batch_axis: str | None
    impl: conv.Implementation

    @nn.compact
    def __call__(self, x: conv.Activations, train: bool) -> conv.Activations:
        shape = (x.shape[conv.CHANNEL_AXIS[self.impl]],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        epsilon = nn.BatchNorm.epsilon
        if not train:
            return conv.batch_norm_inference(x, mean.value, variance.value, scale, bias, epsilon, impl=self.impl)
        x, *now = conv.batch_norm(x, scale, bias, epsilon, batch_axis=self.batch_axis, impl=self.impl)
        for average, value in zip((mean, variance), now, strict=True):
            average.value = self.momentum * average.value + (1 - self.momentum) * value
        return x


class Ensemble(NamedTuple):
    """Networks that answer together: the mean of their class probabilities.

    Used as a `CNN` is, with the variables that `join` makes of theirs.
    """

    members: tuple[CNN, ...]

    def init(self, *arguments) -> dict:
        return join([member.init(*arguments) for member in self.members])

    def apply(self, variables: Mapping[str, Any], images: Images) -> Array:
        """Logits [batch, classes], as of a `CNN`: the logarithm of the mean of the members' probabilities."""
        return mean_logits(lambda member, part: member.apply(part, images), self.members, self.split(variables))

    def clone(self, **updates) -> "Ensemble":
        return Ensemble(tuple(member.clone(**updates) for member in self.members))

    def split(self, variables: Mapping[str, Any]) -> list[dict]:
        """The members' own variables."""
        names = [f"member{i}" for i in range(len(self.members))]
        return [{kind: parts[name] for kind, parts in variables.items() if name in parts} for name in names]


def is_built_in(network: Any) -> bool:
    """Whether a network is a `CNN`, or an `Ensemble` of nothing else."""
    return all(isinstance(member, CNN) for member in getattr(network, "members", (network,)))


def join(variables: Sequence[Mapping[str, Any]]) -> dict:
    """The variables of an ensemble: those of its members as {"params": {"member0": ...}, "batch_stats": ...}."""
    kinds = ("params", "batch_stats")
    return {kind: {f"member{i}": part.get(kind, {}) for i, part in enumerate(variables)} for kind in kinds}


def mean_logits(apply: Callable, members: Sequence[CNN], parts: Sequence[Any]) -> Float[Array, "batch classes"]:
    """The logarithm of the mean over members of softmax(apply(member, part)).

    Members of one architecture are one compiled loop: a member at a time fills a device, and compiles once for all;
    unrolled, 15 networks of 7 layers compiled six times as long, and `vmap` would group their convolutions.
    """
    groups: dict[CNN, list] = {}
    for member, part in zip(members, parts, strict=True):
        groups.setdefault(member, []).append(part)

    def log_probabilities(member: CNN, parts: list) -> Float[Array, "members batch classes"]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        return lax.map(lambda part: jax.nn.log_softmax(apply(member, part)), stacked)

    found = jnp.concatenate([log_probabilities(*group) for group in groups.items()])
    return jax.nn.logsumexp(found, axis=0) - jnp.log(len(members))


def drop(keys: Key[Array, " batch"], x: Float[Array, "batch ..."], rate) -> Array:
    """Dropout (Srivastava et al. 2014): zeroes entries with probability `rate`, scales the rest by 1 / (1 - rate).

    One key an example. `rate` is rounded to a 256th: random bytes cost a fourth of the random words that an exact one
    takes, which on a CPU cost as much as the convolutions.
    """
    dropped = jnp.round(256 * jnp.asarray(rate, jnp.float32))
    draws = jax.vmap(lambda key: random_bytes(key, x.shape[1:]))(keys)
    return jnp.where(draws >= dropped, x / (1 - dropped / 256).astype(x.dtype), 0)


def make_model(config: ConfigDict, hyper: Mapping[str, Any], num_classes: int, batch_axis: str | None = None) -> CNN:
    """The network of `config.model`, with the rates that `hyper` gives (see `state.hyperparameters`)."""
    layers, backend = len(config.channels), jax.default_backend()
    fields = {name: hyper.get(f"model.{name}", value) for name, value in config.items()}
    for name, value in config.items():
        if isinstance(value, list | tuple):
            fields[name] = tuple(value) if name in ("channels", "dense") else per_layer(value, layers)
        if name.endswith("dropout_rate") and not value:
            fields[name] = None
    impl = fields.pop("conv")
    if fields["compute_dtype"] == "auto":
        fields["compute_dtype"] = default_dtype(backend)
    return CNN(
        **fields | {"compute_dtype": jnp.dtype(fields["compute_dtype"])},
        impl=conv.default_impl(backend) if impl == "auto" else impl,
        num_classes=num_classes,
        batch_axis=batch_axis,
    )


def scale_pixels(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Pixels 0..255 as float32 in [0, 1]: the form the network takes."""
    return images.astype(jnp.float32) / 255


def first_kernel(variables: Mapping[str, Any]) -> Float[Array, "kernel_height kernel_width 1 channels"]:
    """The filters that look at the image itself; of an ensemble, those of its first member."""
    params = variables["params"]
    return params.get("member0", params)["conv0_kernel"]
