"""What a config may hold: every mistake in one is found here, before any work starts."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mnist_flax.runtime import cli
from mnist_flax.runtime.cli import UserError

_CHOICES = {
    "dataset": ("mnist", "fashion_mnist", "kmnist", "digits"),
    "feed": ("device", "stream"),
    "model.padding": ("SAME", "VALID"),
    "model.head": ("flatten", "average"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.conv": ("auto", "matmul", "mixed", "lax"),
    "optimizer.name": ("adam", "adamw", "sgd", "lion", "muon"),
    "optimizer.schedule": ("constant", "cosine", "one_cycle"),
    "checkpoint.select": ("last", "best"),
}
_LARGEST = 3.4028234663852886e38  # float32, in which training computes, has no larger number
# Lowest and highest value allowed, both included.
_RANGES = {
    "seed": (0, 2**31 - 1),
    "validation_examples": (0, None),
    "train_examples": (1, None),
    "model.batch_norm_momentum": (0.0, 1.0),
    "model.dropout_rate": (0.0, 0.99),
    "optimizer.learning_rate": (0.0, None),
    "optimizer.warmup_epochs": (0.0, None),
    "optimizer.final_scale": (0.0, 1.0),
    "optimizer.b1": (0.0, 0.999999),
    "optimizer.b2": (0.0, 0.999999),
    "optimizer.eps": (1e-30, None),  # where a gradient is 0, 0 would be divided by it
    "optimizer.momentum": (0.0, 0.999999),
    "optimizer.weight_decay": (0.0, None),
    "optimizer.clip_norm": (0.0, None),
    "optimizer.accumulate_steps": (1, None),
    "optimizer.ema_decay": (0.0, 0.999999),
    "optimizer.label_smoothing": (0.0, 0.999),
    "augment.rotation": (0.0, 180.0),
    "augment.shift": (0.0, 28.0),
    "augment.zoom": (0.0, 0.9),
    "augment.shear": (0.0, 2.0),
    "augment.filter": (0.0, 1.0),
    "augment.strokes": (0.0, 14.0),
    "augment.invert": (0.0, 1.0),
    "augment.tone": (0.0, 1.0),
    "augment.clouds": (0.0, 1.0),
    "augment.specks": (0.0, 1.0),
    "augment.probability": (0.0, 1.0),
    "augment.final_epochs": (0.0, None),
    "augment.final_scale": (0.0, 1.0),
    "num_epochs": (1, None),
    "batch_size": (1, None),
    "eval_batch_size": (1, 65_536),
    "target_accuracy": (0.0, 1.0),
    "patience": (0, None),
    "checkpoint.keep": (1, None),
}
_OPTIONAL = {"data_dir": str, "archive_dir": str, "validation_examples": int, "train_examples": int}  # may be None
_IN_WORDS = {
    int: "a whole number, such as 3",
    float: "a number with a point, such as 3.0",
    bool: "True or False",
    str: "a text, such as 'mnist'",
    tuple: "whole numbers in parentheses, such as (3,) or (3, 5)",
}
_MOST_WHOLE = 2**31 - 1  # a step is an int32
_MOST_PARAMETERS = 2**28  # 1 GiB in float32, and Adam keeps two more of each
# Lowest and highest entry of the tuples that hold one entry a convolutional layer.
_PER_LAYER = {"kernel_sizes": (1, 7), "pool_sizes": (1, 4)}
# Fields of earlier versions, and the value (of tuples: of each entry) at which they did nothing; None: any, alone.
_REMOVED = {
    "model.strides": 1,
    "model.pooling": "max",
    "model.conv_dropout_rate": 0.0,
    "optimizer.decay_rate": None,
    "augment.elastic_alpha": 0.0,
    "augment.elastic_sigma": None,
    "augment.cutout": 0.0,
}


def default_config() -> ConfigDict:
    """The reference recipe, which defines which fields exist and what type each has."""
    from mnist_flax.configs import default

    return default.get_config()


def find_field(name: str) -> str | None:
    """The full name of a field whose group may be left out, or None."""
    return next((key for key in flatten(default_config()) if f".{key}".endswith(f".{name}")), None)


def unknown_field(key: str, fields: Iterable[str]) -> UserError:
    """The error of a field that is not known, with the nearest name."""
    near = difflib.get_close_matches(key, fields, n=1)
    hint = f"did you mean config.{near[0]}?" if near else "configs/default.py has them all"
    return UserError(f"config.{key} is no known field: {hint}")


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets fields of a config, in place: groups are dictionaries, and fields that refer to those set follow.

    Raises:
      UserError: a field is unknown, or has another type.
    """
    fields = flatten(default_config())
    for key, value in flatten(overrides).items():
        if key not in fields:
            raise unknown_field(key, fields)
        try:
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{key}={value!r}: {cli.reason(error)}") from error


def check_config(config: ConfigDict) -> None:
    """Refuses a config that training could not run, with one line.

    Raises:
      UserError: a field that is unknown or missing, of the wrong type, out of range, or at odds with another.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() must return an ml_collections.ConfigDict, not {type(config).__name__}")
    values = flatten(config)
    _check_fields(values, flatten(default_config()))
    _check_choices(values)
    _check_ranges(values)
    _check_directories(values)
    last_size = _check_model(config.model)
    _check_batch_size(config, last_size)
    _check_durations(config, values)
    _check_validation(config, values)


def _check_fields(values: Mapping, reference: Mapping) -> None:
    for key in values:
        if key not in reference:
            raise unknown_field(key, reference)
    for key, default in reference.items():
        if key not in values:
            raise UserError(f"config.{key} is missing: start the recipe from configs/default.py")
        value = values[key]
        kind = _OPTIONAL.get(key, type(default))
        if key in _OPTIONAL and value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"config.{key}={value!r} must be {_IN_WORDS[kind]}")


def _check_choices(values: Mapping) -> None:
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config.{key}={values[key]!r} is unknown: use one of {', '.join(choices)}")


def _check_ranges(values: Mapping) -> None:
    for key, (low, high) in _RANGES.items():
        value = values[key]
        most = _MOST_WHOLE if isinstance(low, int) else _LARGEST
        if value is not None and not low <= value <= (most if high is None else high):  # nor NaN
            finite = ", finite in float32" if isinstance(value, float) else ""
            span = f"at least {low}{finite}" if high is None else f"from {low} to {high}"
            raise UserError(f"config.{key}={value} is out of range: use a number {span}")


def _check_directories(values: Mapping) -> None:
    for key in ("data_dir", "archive_dir"):
        if values[key] == "":
            raise UserError(f"config.{key} is empty (a shell variable that is not set?): name a directory")
        if values[key] is not None:
            cli.check_path(f"config.{key}={values[key]}", values[key])
        if values[key] is not None and not _is_path(values[key]):
            raise UserError(f"config.{key}={values[key]!r} cannot be the name of a directory")


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(Path(text).expanduser())
    except (ValueError, RuntimeError):  # half a surrogate pair; the home of nobody
        return False


def _check_model(model: ConfigDict) -> int:
    """Gives the number of rows after the last convolution, before its pooling."""
    _check_layers(model)
    layers = len(model.channels)
    size, inputs, parameters = 28, 1, 0
    shapes = zip(model.channels, *(per_layer(model[key], layers) for key in _PER_LAYER), strict=True)
    for outputs, kernel, pool in shapes:
        parameters += kernel**2 * inputs * outputs
        inputs = outputs
        convolved = size if model.padding == "SAME" else size - kernel + 1
        size = convolved // pool
        if size < 1:
            raise UserError("config.model shrinks the image to nothing: use fewer or smaller pools, or SAME")
    inputs *= 1 if model.head == "average" else size**2
    for outputs in model.dense:
        parameters += inputs * outputs
        inputs = outputs
    if parameters > _MOST_PARAMETERS:
        raise UserError(
            f"config.model has {parameters:,} parameters, more than {_MOST_PARAMETERS:,}: "
            "use fewer config.model.channels or config.model.dense"
        )
    return convolved


def _check_layers(model: ConfigDict) -> None:
    layers = len(model.channels)
    if not layers:
        raise UserError("config.model.channels is empty: give at least one convolutional layer")
    for key in ("channels", "dense"):
        if not all(type(width) is int and 1 <= width <= 65_536 for width in model[key]):
            raise UserError(f"config.model.{key}={model[key]} must hold whole numbers from 1 to 65536")
    for key, (low, high) in _PER_LAYER.items():
        if not all(type(entry) is int and low <= entry <= high for entry in model[key]):
            raise UserError(f"config.model.{key}={model[key]} must hold whole numbers from {low} to {high}")
        if len(model[key]) not in (1, layers):
            raise UserError(
                f"config.model.{key}={model[key]} must hold one entry, or one for each of the {layers} entries "
                f"of config.model.channels={model.channels}"
            )


def _check_batch_size(config: ConfigDict, last_size: int) -> None:
    """`last_size`: rows after the last convolution, over which batch norm averages."""
    if config.batch_size % config.optimizer.accumulate_steps:
        raise UserError(
            f"config.optimizer.accumulate_steps={config.optimizer.accumulate_steps} must divide "
            f"config.batch_size={config.batch_size}"
        )
    lonely = config.model.logits_batch_norm or (config.model.batch_norm and last_size == 1)
    if lonely and config.batch_size == config.optimizer.accumulate_steps:
        raise UserError(
            "batch norm learns nothing from one number at a time, which it makes 0: "
            "use a larger config.batch_size, or fewer config.optimizer.accumulate_steps"
        )


def _check_durations(config: ConfigDict, values: Mapping) -> None:
    for key in ("optimizer.warmup_epochs", "augment.final_epochs"):
        if values[key] > config.num_epochs:
            raise UserError(
                f"config.{key}={values[key]:g} is longer than the run: "
                f"use at most config.num_epochs={config.num_epochs}"
            )


def _check_validation(config: ConfigDict, values: Mapping) -> None:
    """Refuses what is decided on validation data where there are none."""
    for key, wanted in (
        ("checkpoint.select", config.checkpoint.select == "best"),
        ("target_accuracy", config.target_accuracy > 0),
        ("patience", config.patience > 0),
    ):
        if wanted and config.validation_examples == 0:
            raise UserError(f"config.{key}={values[key]} needs validation data: set config.validation_examples")


def per_layer(values: Sequence[int], layers: int) -> tuple[int, ...]:
    """One entry for each of `layers` layers: a single entry holds for all of them."""
    return tuple(values) * layers if len(values) == 1 else tuple(values)


def flatten(config: Mapping, prefix: str = "") -> dict:
    """Fields under dotted names: {"optimizer": {"b1": 0.9}} gives {"optimizer.b1": 0.9}."""
    fields: dict = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        fields |= flatten(value, f"{name}.") if isinstance(value, ConfigDict | Mapping) else {name: value}
    return fields


def recorded(fields: Mapping) -> ConfigDict:
    """The config of which JSON holds these fields, with the defaults of fields that came after it was written.

    Raises:
      UserError: it is none that could have been written, or sets a field that this version no longer has.
    """
    config = default_config()
    try:
        values = _without_removed(flatten(fields))
        for key, default in flatten(config).items():
            if isinstance(default, tuple) and isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        config.unlock()
        config.update_from_flattened_dict(values)
        config.lock()
        check_config(config)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(cli.reason(error)) from error
    return config


def _without_removed(values: Mapping) -> dict:
    for key, neutral in _REMOVED.items():
        entries = value if isinstance(value := values.get(key, neutral), list | tuple) else [value]
        if neutral is not None and any(entry != neutral for entry in entries):
            raise UserError(f"config.{key}={value!r} is no longer supported: use the version that recorded it")
    return {key: value for key, value in values.items() if key not in _REMOVED}


def differences(recorded: Mapping, wanted: Mapping) -> list[str]:
    """Lines `KEY: recorded -> wanted` for each field that differs, but for where data lie, and `debug`."""
    old, new = flatten(recorded), flatten(wanted)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = (_plain(fields.get(key)) for fields in (old, new))
        if before != after and key not in ("data_dir", "archive_dir", "debug"):
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
