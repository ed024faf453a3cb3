"""Where trials are placed in a space: quasi-random points, and Optuna's samplers once there is something to learn from.

All draw from Optuna trials, and where they would try a point again they go to one near it: see `untried`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, TPESampler

from mnist_flax.experiments.research import untried
from mnist_flax.experiments.research.space import Dimension, Space, label


class QuasiRandom(BaseSampler):
    """Scrambled Sobol points (Owen 1998): trial n takes point n, whichever worker runs it and when.

    Optuna's own `QMCSampler` draws at random until a trial is complete, and for conditional ranges always.
    """

    def __init__(self, names: Sequence[str], seed: int):
        self._names, self._seed = list(names), seed

    def infer_relative_search_space(self, study, trial) -> dict:
        return {}

    def sample_relative(self, study, trial, search_space) -> dict:
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        share = sobol_point(len(self._names), self._seed, trial.number)[self._names.index(param_name)]
        return place(share, param_distribution)


@lru_cache(maxsize=1024)
def sobol_point(dimensions: int, seed: int, number: int) -> tuple[float, ...]:
    """Point `number` of a scrambled Sobol sequence in [0, 1)."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(dimensions, scramble=True, rng=seed)
    if number:
        sequence.fast_forward(number)
    return tuple(sequence.random(1)[0].tolist())


def place(share: float, distribution) -> Any:
    """The value that has this share of the distribution below it."""
    match distribution:
        case CategoricalDistribution():
            return distribution.choices[int(share * len(distribution.choices))]
        case IntDistribution():
            value: float = round(_between(share, distribution.low - 0.5, distribution.high + 0.5, distribution.log))
        case _:
            value = _between(share, distribution.low, distribution.high, distribution.log)
    return min(max(value, distribution.low), distribution.high)  # rounding may lead beyond


def _between(share: float, low: float, high: float, log: bool) -> float:
    if log:
        return math.exp(_between(share, math.log(low), math.log(high), log=False))
    return low + share * (high - low)


class WithoutRepetition(BaseSampler):
    """Another sampler's points, moved where they were tried; `tried` grows with what is drawn."""

    def __init__(self, sampler: BaseSampler, space: Space, tried: list[untried.Point]):
        self._sampler, self._space, self._tried = sampler, space, tried

    def infer_relative_search_space(self, study, trial) -> dict:
        return {key: distribution(dimension) for key, dimension in self._space.items()}

    def sample_relative(self, study, trial, search_space) -> dict:
        if "fixed_params" in trial.system_attrs:  # an entry of a sweep
            return {}
        proposed = self._sampler.sample_relative(study, trial, self._sampler.infer_relative_search_space(study, trial))

        def propose(key: str) -> Any:
            if key in proposed:
                return _from_label(self._space[key], proposed[key])
            return _from_label(self._space[key], self.sample_independent(study, trial, key, search_space[key]))

        point = untried.draw(self._space, point_of(self._space, trial), propose, self._tried)
        self._tried.append(point)
        return {key: label(value) for key, value in point.items()}

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study, trial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(self, study, trial, state, values) -> None:
        self._sampler.after_trial(study, trial, state, values)


def point_of(space: Space, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The values that a trial has, or was queued with."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return {key: _from_label(dimension, params[key]) for key, dimension in space.items() if key in params}


def make_sampler(name: str, space: Space, seed: int, complete: int, asked: int) -> BaseSampler:
    """The sampler for the next trials, after `complete` trials with a result and `asked` with or without one.

    `tpe` (multivariate; Bergstra et al. 2011) and `cmaes` (Hansen 2016; conditional ranges and choices stay
    quasi-random) begin with quasi-random points, as many as 10 or two a range.
    """
    quasirandom = QuasiRandom(list(space), seed)
    if name == "quasirandom" or complete < max(10, 2 * len(space)):
        return quasirandom
    if name == "tpe":
        # Trials that run elsewhere count as bad, so that workers and members keep apart.
        return TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=0, seed=seed + asked)
    return CmaEsSampler(
        independent_sampler=quasirandom, warn_independent_sampling=False, n_startup_trials=0, seed=seed + asked
    )


def points(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """Quasi-random overrides, for a `sweep()` that gives each of several spaces the same budget."""
    shares = [sobol_point(len(space), seed, number) for number in range(count)]
    drawn = [zip(space.items(), point, strict=True) for point in shares]
    return [{key: _from_label(d, place(share, distribution(d))) for (key, d), share in point} for point in drawn]


def distribution(dimension: Dimension) -> BaseDistribution:
    """A range as Optuna describes it."""
    match dimension.kind:
        case "choice":
            return CategoricalDistribution([label(value) for value in dimension.values])
        case "integer":
            return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        case _:
            return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _from_label(dimension: Dimension, value: Any) -> Any:
    return next(v for v in dimension.values if label(v) == value) if dimension.values else value


def _draw(trial: optuna.Trial, key: str, dimension: Dimension) -> Any:
    match distribution(dimension):
        case CategoricalDistribution() as choices:
            return trial.suggest_categorical(key, choices.choices)
        case IntDistribution() as span:
            return trial.suggest_int(key, span.low, span.high, log=span.log)
        case FloatDistribution() as span:
            return trial.suggest_float(key, span.low, span.high, log=span.log)


def suggest(trial: optuna.Trial, space: Space, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides of the config for a trial, in the order of the space; conditional ranges only where they apply.

    `fixed` is the entry of a sweep that the trial was queued with, as `fixed_params` gives it.
    """
    overrides: dict[str, Any] = {}
    for key, dimension in space.items():
        if fixed is not None and key not in fixed:
            continue
        if dimension.applies(overrides):
            overrides[key] = _from_label(dimension, _draw(trial, key, dimension))
    return overrides


def fixed_params(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a sweep as Optuna queues it."""
    return {key: label(value) for key, value in entry.items()}
