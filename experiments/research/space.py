"""What a study searches: ranges by dotted config name, or a sweep, as a config file defines them.

def search_space():
    return {
        "optimizer.name": space.choice("adam", "sgd"),
        "optimizer.learning_rate": space.log_uniform(1e-4, 1e-1),
        "optimizer.momentum": space.uniform(0.5, 0.99).when("optimizer.name", "sgd"),
        "num_epochs": space.integer(1, 4),
    }

def sweep():  # instead: every combination that is to be tried
    return space.product({"seed": [0, 1, 2], "batch_size": [32, 64]})
"""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ml_collections import ConfigDict

from mnist_flax.experiments.research import members
from mnist_flax.runtime import cli
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.cli import UserError

OBJECTIVES = ("validation_error", "validation_loss", "epochs_to_target")
SAMPLERS = ("quasirandom", "tpe", "cmaes")
LEAST = 1e-300  # where a logarithmic range may begin


@dataclass(frozen=True)
class Plan:
    """How a study is run, and what for; a config file's `plan()` returns one. Everything is minimised."""

    question: str = ""
    scientific: tuple[str, ...] = ()  # what the question is about; the rest of the space is nuisance
    objective: Literal["validation_error", "validation_loss", "epochs_to_target"] = "validation_error"
    target: float = 0.99  # validation accuracy, of epochs_to_target
    evaluations: int = 0  # of every trial, evenly over its steps; 0 is one an epoch of the longest
    sampler: Literal["quasirandom", "tpe", "cmaes"] = "quasirandom"
    repeats: int = 1  # seeds, from config.seed on, that every trial is trained with; its value is their mean
    rounds: int = 1  # of successive halving: the worse half of a population stops at 1/2, 1/4, ... of its steps


@dataclass(frozen=True)
class Dimension:
    """One range of a search space."""

    kind: Literal["log_uniform", "uniform", "integer", "choice"]
    low: float = 0
    high: float = 0
    log: bool = False
    values: tuple = ()
    condition: tuple[str, tuple] | None = None

    def when(self, key: str, *values: Any) -> "Dimension":
        """The same range, there only where `key`, a choice or an integer named before it, has one of the values."""
        return replace(self, condition=(key, tuple(map(_plain, values))))

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether a point with these values has a value of this range."""
        if self.condition is None:
            return True
        parent, values = self.condition
        return parent in point and point[parent] in values

    @property
    def count(self) -> float:
        """How many values there are: infinity of a range of real numbers."""
        if self.kind == "choice":
            return len(self.values)
        return self.high - self.low + 1 if self.kind == "integer" else math.inf

    def describe(self) -> str:
        """One line that tells this range from any other."""
        span = ", ".join(map(str, self.values)) if self.kind == "choice" else f"{self.low:g} to {self.high:g}"
        logarithmic = ", logarithmic" if self.kind == "integer" and self.log else ""
        where = f" if {self.condition[0]} in {list(self.condition[1])}" if self.condition else ""
        return f"{self.kind} {span}{logarithmic}{where}"


Space = Mapping[str, Dimension]


def log_uniform(low: float, high: float) -> Dimension:
    """A positive number whose logarithm is uniform."""
    return Dimension("log_uniform", float(low), float(high), log=True)


def uniform(low: float, high: float) -> Dimension:
    return Dimension("uniform", float(low), float(high))


def integer(low: int, high: int, log: bool = False) -> Dimension:
    """A whole number from `low` to `high`, both included."""
    return Dimension("integer", low, high, log)


def choice(*values: Any) -> Dimension:
    """One of these values: names, numbers or tuples, in no order."""
    return Dimension("choice", values=tuple(map(_plain, values)))


def product(values: Mapping[str, Iterable]) -> Iterator[dict[str, Any]]:
    """All combinations, as overrides for `sweep()`; the last key varies fastest."""
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _plain(value: Any) -> Any:
    """A value as a config holds it: its tuples may be given as lists."""
    return tuple(value) if isinstance(value, list) else value


def label(value: Any) -> Any:
    """A choice as Optuna stores it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


@dataclass(frozen=True)
class Definition:
    """A study's config file, checked."""

    config: ConfigDict
    space: Space
    sweep: Sequence[Mapping[str, Any]]  # empty for a search
    plan: Plan
    derive: Callable[[ConfigDict], None] = field(default=lambda config: None, compare=False)

    def trial_config(self, overrides: Mapping[str, Any]) -> ConfigDict:
        """The config of a trial: its overrides, then the fields that follow from them.

        Raises:
          UserError: there can be no such run, or not in the same population as the others.
        """
        try:
            config = members.with_fields(self.config, overrides)
            self.derive(config)
        except Exception as error:  # `derive` is the user's
            raise UserError(f"a trial's config cannot be made: {cli.reason(error)}") from error
        members.check_population([self.config, config])
        return config

    def identity(self) -> dict[str, Any]:
        """All that must not change while a study goes on, under readable names."""
        kept = _named(self.config)
        searched = {f"space.{key}": dimension.describe() for key, dimension in self.space.items()}
        compared: dict[str, Any] = {"objective": self.plan.objective, "repeats": self.plan.repeats}
        if self.plan.objective == "epochs_to_target":  # evaluations are where it can be seen to be reached
            compared |= {"target": self.plan.target, "evaluations": self.plan.evaluations}
        return kept | searched | compared


def _named(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config as an identity names them."""
    fields = config_lib.flatten(config)
    return {f"config.{key}": value for key, value in fields.items() if key not in ("data_dir", "archive_dir")}


def recorded_identity(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that a study recorded, with the defaults of what came after it, as `config.recorded` fills them in.

    Raises:
      UserError: it holds a field that there is no more.
    """
    fields = {key.removeprefix("config."): value for key, value in recorded.items() if key.startswith("config.")}
    return {"repeats": Plan.repeats, **recorded, **_named(config_lib.recorded(fields))}


def define(module: Any, config: ConfigDict, repeats: int | None = None) -> Definition:
    """Reads `search_space()` or `sweep()`, and `plan()` and `derive(config)` where there are any, off a config file.

    `repeats` replaces those of the plan.

    Raises:
      UserError: there is no space, or one that no trial could come from.
    """
    members.check_population([config])
    if config.validation_examples == 0:
        raise UserError("a study compares trials on validation data: set config.validation_examples")
    if hasattr(module, "search_space") == hasattr(module, "sweep"):
        raise UserError("the recipe must define either search_space() or sweep(), as configs/studies/adam.py does")
    sweep: list[Mapping[str, Any]] = []
    if hasattr(module, "sweep"):
        sweep = _given(module, "sweep", list)
        if not sweep or not all(isinstance(entry, Mapping) and entry for entry in sweep):
            raise UserError("sweep() must yield overrides, one or more: {'optimizer.learning_rate': 0.001}")
        entries = [{key: _plain(value) for key, value in entry.items()} for entry in sweep]
        sweep = [entry for i, entry in enumerate(entries) if entry not in entries[:i]]
        space: Space = {}  # once the entries are known to be sound
    else:
        space = _given(module, "search_space")
        if not isinstance(space, Mapping) or not space:
            raise UserError("search_space() must return ranges by field, one or more: {'seed': space.integer(0, 9)}")
    plan = _given(module, "plan") if hasattr(module, "plan") else Plan()
    if not isinstance(plan, Plan):
        raise UserError(f"plan() must return a space.Plan, not {type(plan).__name__}")
    plan = plan if repeats is None else replace(plan, repeats=repeats)
    derive = getattr(module, "derive", lambda config: None)
    definition = Definition(config, dict(space), sweep, plan, derive)
    baseline = definition.trial_config({})  # which a confirmation trains beside the winner
    _check_seed(baseline, definition.trial_config({"seed": baseline.seed ^ 1}))
    for key in (key for entry in (space, *sweep) for key in entry):
        _check_key(key, config)
    for entry in sweep:
        definition.trial_config(entry)
    if sweep:
        definition = replace(definition, space=sweep_space(sweep))
    for key, dimension in definition.space.items():
        _check_dimension(key, dimension, definition)
    _check_plan(plan, definition.space)
    if plan.repeats > 1 and "seed" in definition.space:
        raise UserError(f"{plan.repeats} repeats are trials with other seeds, and seed is in the space: use either")
    definition.trial_config({"seed": config.seed + plan.repeats - 1})
    return definition


def _check_seed(config: ConfigDict, other: ConfigDict) -> None:
    """Raises UserError if fields follow the seed: a confirmation repeats a recorded config under other seeds."""
    if followers := changed(config, other).keys() - {"seed"}:
        raise UserError(f"config.{min(followers)} follows config.seed: seeds of a study must train the same recipe")


def _given(module: Any, name: str, kind: Callable = lambda given: given) -> Any:
    """What a function of the config file returns, made a `kind`.

    Raises:
      UserError: it fails.
    """
    try:
        return kind(getattr(module, name)())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}() fails with {type(error).__name__}: {cli.reason(error)}") from error


def sweep_space(sweep: Sequence[Mapping[str, Any]]) -> Space:
    """Every key of the entries, with the values that it has in them."""
    keys = dict.fromkeys(key for entry in sweep for key in entry)
    return {key: choice(*dict.fromkeys(entry[key] for entry in sweep if key in entry)) for key in keys}


def changed(base: ConfigDict, config: ConfigDict) -> dict[str, Any]:
    """The fields in which `config` differs from `base`, with their values in `config`."""
    before = config_lib.flatten(base)
    return {key: value for key, value in config_lib.flatten(config).items() if value != before[key]}


def _check_plan(plan: Plan, space: Space) -> None:
    if plan.objective not in OBJECTIVES or plan.sampler not in SAMPLERS:
        raise UserError(f"plan(): objective is one of {', '.join(OBJECTIVES)}, sampler one of {', '.join(SAMPLERS)}")
    for name, kind, low, high in (
        ("target", int | float, 0, 1),
        ("evaluations", int, 0, None),
        ("repeats", int, 1, 1_000),
        ("rounds", int, 1, 6),  # as --rounds allows
    ):
        value = getattr(plan, name)
        if not isinstance(value, kind) or not low <= value <= (value if high is None else high):
            span = f"from {low} to {high}" if high else f"from {low} on"
            raise UserError(f"plan(): {name}={value!r} must be a {'whole ' if kind is int else ''}number {span}")
    if not isinstance(plan.question, str) or not isinstance(plan.scientific, tuple | list):
        raise UserError("plan(): question is a text, scientific a tuple of fields: ('optimizer.name',)")
    for key in plan.scientific:
        if key not in list(space):
            raise UserError(f"plan(): {key!r} is called scientific and is not in the space")


def _check_key(key: Any, config: ConfigDict) -> None:
    fields = config_lib.flatten(config)
    if key not in fields:
        near = difflib.get_close_matches(str(key), fields, n=1)
        raise UserError(f"space: {key} is no field of the config" + (f": did you mean {near[0]}?" if near else ""))


def _can_be(dimension: Dimension, value: Any) -> bool:
    """Whether trials have this value; one number of a range of real ones they never have."""
    if dimension.kind == "choice":
        return value in dimension.values
    return dimension.kind == "integer" and isinstance(value, int) and dimension.low <= value <= dimension.high


def _check_dimension(key: str, dimension: Dimension, definition: Definition) -> None:
    space = definition.space
    if not isinstance(dimension, Dimension):
        raise UserError(
            f"space: {key} must be log_uniform, uniform, integer or choice of mnist_flax.experiments.research.space"
        )
    if dimension.kind == "choice":
        if not dimension.values:
            raise UserError(f"space: {key} is an empty choice: name its values")
        if any(value in dimension.values[:i] for i, value in enumerate(dimension.values)):
            raise UserError(f"space: the choice of {key} names a value twice: name each once")
        ends = dimension.values
    else:
        ends = (dimension.low, dimension.high)
        if dimension.kind == "integer" and not all(isinstance(end, int) for end in ends):
            raise UserError(f"space: the range of {key} must have whole ends")
        if not dimension.low < dimension.high:
            raise UserError(f"space: the range of {key}, {dimension.low} to {dimension.high}, is empty")
        if dimension.log and dimension.low < LEAST:
            raise UserError(f"space: the range of {key} is logarithmic and must begin above 0, at {LEAST} or more")
    condition = {}
    if dimension.condition:
        parent, values = dimension.condition
        before = list(space)[: list(space).index(key)]
        if parent not in before:
            raise UserError(f"space: {key} depends on {parent}, which must be named before it")
        if not values or not all(_can_be(space[parent], value) for value in values):
            raise UserError(f"space: {key} depends on values that {parent} never has: {list(values)}")
        condition = {parent: values[0]}
    if not definition.sweep:  # the entries of a sweep are checked whole
        for end in ends:
            try:
                definition.trial_config(condition | {key: end})
            except UserError as error:
                raise UserError(f"space: {key}={end!r} cannot be: {error}") from error
