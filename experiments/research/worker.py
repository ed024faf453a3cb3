"""A worker of a study: takes trials, trains them as populations, tells what came of them."""

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from jaxtyping import Bool
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from mnist_flax.experiments.research import members, samplers, space, storage, untried
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import terminal
from mnist_flax.runtime.cli import UserError, reason

_LIVE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.WAITING)


def join(name: str, definition: space.Definition, database: RDBStorage, directory: Path) -> optuna.Study:
    """Opens the study, or makes it if this is its first worker.

    Raises:
      UserError: there is a study of this name and another config.
    """
    with storage.exclusive(database):
        study = optuna.create_study(storage=database, study_name=name, direction="minimize", load_if_exists=True)
        wanted = definition.identity()
        recorded = study.user_attrs.get("identity")
        if recorded is None:
            study.set_user_attr("baseline", space.changed(definition.config, definition.trial_config({})))
            study.set_user_attr("identity", wanted)
        elif changes := _changes(recorded, wanted, directory):
            raise UserError(
                f"{directory} holds a study of another config ({'; '.join(changes)}): use another directory"
            )
        _queue_sweep(study, definition)
    return study


def _changes(recorded: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> list[str]:
    try:
        return config_lib.differences(space.recorded_identity(recorded), wanted)
    except UserError as error:
        raise UserError(f"{directory} holds a study of another version ({error}): use another directory") from error


def _queue_sweep(study: optuna.Study, definition: space.Definition) -> None:
    """Queues each entry of a sweep once."""
    there = [t.system_attrs.get("fixed_params") for t in live(study.get_trials(deepcopy=False))]
    for entry in map(samplers.fixed_params, definition.sweep):
        if entry not in there:
            study.enqueue_trial(entry)


def live(trials: Sequence[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """Trials that count: not those that were abandoned, of which there is a later copy."""
    return [trial for trial in trials if trial.state in _LIVE or "error" in trial.user_attrs]


def objective(plan: space.Plan, records: Sequence[members.Record]) -> float:
    """What a trial that ran to its end is worth, the lower the better: see `Plan.objective`.

    A trial that never reached the target counts its epochs and as many again for each point that it fell short by, so
    that it is worse than all that did and still comparable.
    """
    if plan.objective != "epochs_to_target":
        return pruning_score(plan, records)
    for record in records:
        if record.accuracy >= plan.target:
            return record.epoch
    return records[-1].epoch * (1 + 100 * (plan.target - max(record.accuracy for record in records)))


def pruning_score(plan: space.Plan, records: Sequence[members.Record]) -> float:
    """What trials are compared by before their end."""
    return records[-1].loss if plan.objective == "validation_loss" else 1 - records[-1].accuracy


class Worker:
    """One process that works on a study."""

    def __init__(
        self,
        study: optuna.Study,
        database: RDBStorage,
        definition: space.Definition,
        programs: members.Programs,
        *,
        trials: int,
        population: int,
        sampler: str,
        rounds: int,
        test: bool,
        stop: Callable[[], bool],
    ):
        """`trials` is the size that the whole study grows to, `population` the most to train at once.

        `test` scores the test split at the end of each trial: for confirmation, never for selection.
        """
        self.study, self._database, self._definition = study, database, definition
        self._trials, self._population, self._sampler, self._rounds = trials, population, sampler, rounds
        self._test, self._stop = test, stop
        self._programs = programs
        self._best = math.inf
        self._total = trials  # as many as there can be

    def run(self) -> bool:
        """Works until the study has all its trials; False if it was asked to stop before."""
        told = 0
        while not self._stop():
            batch = self._take()
            if batch:
                self._train(batch)
            elif others := self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if len(others) != told:
                    terminal.console.print(f"waiting for {len(others)} trials of other workers")
                told = len(others)
                time.sleep(self._database.heartbeat_interval or 1)
            else:
                if self._total < self._trials:
                    print(
                        f"the space is exhausted: {self._total} trials are all its points, fewer than "
                        f"--trials={self._trials}; for more seeds of each, use --repeats=N and another --workdir"
                    )
                return True
        return False

    def _take(self) -> list[tuple[optuna.Trial, dict[str, Any]]]:
        """Asks for as many trials as fill a population and the study still lacks; gives them with their overrides."""
        ranges = self._definition.space
        with storage.exclusive(self._database):
            retried = storage.retry_abandoned(self.study, self._database)
            if retried:
                terminal.console.print(f"{retried} trials were abandoned and will be tried again")
            everything = self.study.get_trials(deepcopy=False)
            counted = live(everything)
            tried = _distinct(samplers.point_of(ranges, trial) for trial in counted)
            untried_points = 0 if self._definition.sweep else untried.size(ranges, {}) - len(tried)
            self._total = int(min(self._trials, len(counted) + untried_points))
            waiting = sum(trial.state == TrialState.WAITING for trial in everything)
            lacking = min(self._trials - (len(counted) - waiting), waiting + untried_points)
            # A pruned trial has a value too in Optuna: what it was compared by when it was stopped.
            values = [t.value for t in everything if t.state == TrialState.COMPLETE and t.value is not None]
            self._best = min(values, default=math.inf)
            sampler = samplers.make_sampler(
                self._sampler, ranges, self._definition.config.seed, len(values), len(everything)
            )
            self.study.sampler = samplers.WithoutRepetition(sampler, ranges, tried)
            fits = max(1, self._population // self._definition.plan.repeats)
            return [self._ask() for _ in range(int(min(lacking, fits)))]

    def _ask(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """A new trial, or one that was queued, with all its parameters recorded before another worker asks."""
        trial = self.study.ask()
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        fixed = self._database.get_trial(trial._trial_id).system_attrs.get("fixed_params")
        overrides = samplers.suggest(trial, self._definition.space, fixed)
        self._database.record_heartbeat(trial._trial_id)
        return trial, overrides

    def _train(self, batch: Sequence[tuple[optuna.Trial, Mapping[str, Any]]]) -> None:
        with storage.heartbeats(self._database, [trial._trial_id for trial, _ in batch]):
            configs: dict[int, Any] = {}
            for trial, overrides in batch:
                try:
                    config = self._definition.trial_config(overrides)
                    trial.set_user_attr("config", space.changed(self._definition.config, config))
                    configs[trial.number] = config
                except UserError as error:
                    self._fail(trial, error)
            self._train_or_split([trial for trial, _ in batch if trial.number in configs], configs)

    def _train_or_split(self, batch: Sequence[optuna.Trial], configs: Mapping[int, Any]) -> None:
        """Trains a population; if that raises, its halves, so that only the trial at fault fails."""
        if not batch:
            return
        try:
            self._train_population(batch, [configs[trial.number] for trial in batch])
        except (MemoryError, ArithmeticError, ValueError, TypeError, LookupError, RuntimeError) as error:
            if isinstance(error, optuna.exceptions.OptunaError):
                raise
            unfinished = [t for t in batch if self._database.get_trial(t._trial_id).state == TrialState.RUNNING]
            if len(unfinished) == 1:
                self._fail(unfinished[0], error)
            elif unfinished:
                half = len(unfinished) // 2
                self._train_or_split(unfinished[:half], configs)
                self._train_or_split(unfinished[half:], configs)

    def _fail(self, trial: optuna.Trial, error: Exception) -> None:
        said = reason(error)
        trial.set_user_attr("error", said)
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        print(f"trial {trial.number} failed and the study goes on: {said}", file=sys.stderr)

    def _train_population(self, batch: Sequence[optuna.Trial], configs: Sequence[Any]) -> None:
        plan = self._definition.plan
        started = time.perf_counter()
        seeded = [members.with_fields(c, {"seed": c.seed + i}) for c in configs for i in range(plan.repeats)]
        population = members.Population(seeded, self._programs, self._population)
        points = max(plan.evaluations or max(config.num_epochs for config in configs), 2 ** (self._rounds - 1))
        ends = {math.ceil(points / 2**i) for i in range(1, self._rounds)}  # of the rounds, but for the last
        active = np.ones(len(batch), bool)

        def histories(i: int) -> list[list[members.Record]]:
            return population.records[i * plan.repeats : (i + 1) * plan.repeats]

        for point in range(1, points + 1):
            population.advance(point / points, np.repeat(active, plan.repeats))
            if self._stop():
                for i in _numbers(active):
                    storage.requeue(self.study, self._database.get_trial(batch[i]._trial_id))
                return
            diverged = population.diverged.reshape(-1, plan.repeats)
            for i in _numbers(active & diverged.any(axis=1)):
                batch[i].set_user_attr("diverged_at_step", histories(i)[diverged[i].argmax()][-1].step)
                self._tell(batch[i], histories(i), None)
            active &= ~diverged.any(axis=1)
            if point in ends and active.sum() > 1:
                ranked = sorted(_numbers(active), key=lambda i: _mean(pruning_score, plan, histories(i)))
                for i in ranked[math.ceil(len(ranked) / 2) :]:
                    batch[i].set_user_attr("stopped_at", point / points)
                    self._tell(batch[i], histories(i), None)
                    active[i] = False
                population.keep(np.repeat(active, plan.repeats))
        tests = population.test() if self._test else []
        for i in _numbers(active):
            if tests and (scores := tests[i]):
                batch[i].set_user_attr("test_accuracy", scores["accuracy"])
            self._tell(batch[i], histories(i), _mean(objective, plan, histories(i)))
        self._report(len(batch), time.perf_counter() - started)

    def _tell(self, trial: optuna.Trial, histories: Sequence[Sequence[members.Record]], value: float | None) -> None:
        """Records a trial's end: complete with a value, pruned without one."""
        curve = np.mean(histories, axis=0)  # over its seeds
        trial.set_user_attr("curve", [[float(f"{number:.6g}") for number in record] for record in curve])
        if value is None:
            last = _mean(pruning_score, self._definition.plan, histories)
            if math.isfinite(last):
                trial.report(last, len(curve))  # what TPE ranks it by
            self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self.study.tell(trial, value, skip_if_finished=True)
            self._best = min(self._best, value)

    def _report(self, trained: int, seconds: float) -> None:
        ended = live(self.study.get_trials(deepcopy=False))
        done = sum(trial.state.is_finished() for trial in ended)
        terminal.console.print(
            f"{done}/{self._total} trials  best {self._definition.plan.objective} {self._best:.5g}  "
            f"{trained} trained in {seconds:.1f} s"
        )


def _mean(worth: Callable, plan: space.Plan, histories: Sequence[Sequence[members.Record]]) -> float:
    """What a trial is worth: the mean over its seeds."""
    return float(np.mean([worth(plan, records) for records in histories]))


def _distinct(points: Iterable[untried.Point]) -> list[untried.Point]:
    return list({frozenset(point.items()): point for point in points}.values())


def _numbers(mask: Bool[np.ndarray, " members"]) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask)]
