"""A worker of a study: takes trials, trains them as populations, tells what came of them."""

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from jaxtyping import Bool
from mnist_flax.experiments.research import members, samplers, space, storage
from optuna.storages import RDBStorage
from optuna.trial import TrialState

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
                f"{directory} holds a study of another config ({'; '.join(changes)}): use another --workdir"
            )
        _queue_sweep(study, definition)
    return study


def _changes(recorded: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> list[str]:
    try:
        return config_lib.differences(space.recorded_identity(recorded), wanted)
    except UserError as error:
        raise UserError(f"{directory} holds a study of another version ({error}): use another --workdir") from error


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
        return standing(plan, records)
    for record in records:
        if record.accuracy >= plan.target:
            return record.epoch
    return records[-1].epoch * (1 + 100 * (plan.target - max(record.accuracy for record in records)))


def standing(plan: space.Plan, records: Sequence[members.Record]) -> float:
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
                return True
        return False

    def _take(self) -> list[optuna.Trial]:
        """Asks for as many trials as fill a population and the study still lacks."""
        with storage.exclusive(self._database):
            retried = storage.retry_abandoned(self.study, self._database)
            if retried:
                terminal.console.print(f"{retried} trials were abandoned and will be tried again")
            everything = self.study.get_trials(deepcopy=False)
            waiting = sum(trial.state == TrialState.WAITING for trial in everything)
            lacking = self._trials - (len(live(everything)) - waiting)
            if self._definition.sweep:
                lacking = min(lacking, waiting)
            # A pruned trial has a value too in Optuna: what it was compared by when it was stopped.
            values = [t.value for t in everything if t.state == TrialState.COMPLETE and t.value is not None]
            self._best = min(values, default=math.inf)
            self.study.sampler = samplers.make_sampler(
                self._sampler, self._definition.space, self._definition.config.seed, len(values), len(everything)
            )
            batch = [self.study.ask() for _ in range(min(lacking, self._population))]
            for trial in batch:
                trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
                self._database.record_heartbeat(trial._trial_id)
        return batch

    def _train(self, batch: Sequence[optuna.Trial]) -> None:
        with storage.heartbeats(self._database, [trial._trial_id for trial in batch]):
            configs: dict[int, Any] = {}
            for trial in batch:
                try:
                    fixed = self._database.get_trial(trial._trial_id).system_attrs.get("fixed_params")
                    overrides = samplers.suggest(trial, self._definition.space, fixed)
                    config = self._definition.trial_config(overrides)
                    trial.set_user_attr("config", space.changed(self._definition.config, config))
                    configs[trial.number] = config
                except UserError as error:
                    self._fail(trial, error)
            self._train_or_split([trial for trial in batch if trial.number in configs], configs)

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
        population = members.Population(configs, self._programs, self._population)
        points = max(plan.evaluations or max(config.num_epochs for config in configs), 2 ** (self._rounds - 1))
        ends = {math.ceil(points / 2**i) for i in range(1, self._rounds)}  # of the rounds, but for the last
        active = np.ones(len(batch), bool)
        for point in range(1, points + 1):
            population.advance(point / points, active)
            if self._stop():
                for i in _numbers(active):
                    storage.requeue(self.study, self._database.get_trial(batch[i]._trial_id))
                return
            for i in _numbers(active & population.diverged):
                batch[i].set_user_attr("diverged_at_step", population.records[i][-1].step)
                self._tell(batch[i], population.records[i], None)
            active &= ~population.diverged
            if point in ends and active.sum() > 1:
                ranked = sorted(_numbers(active), key=lambda i: standing(plan, population.records[i]))
                for i in ranked[math.ceil(len(ranked) / 2) :]:
                    batch[i].set_user_attr("stopped_at", point / points)
                    self._tell(batch[i], population.records[i], None)
                    active[i] = False
                population.keep(active)
        tests = population.test() if self._test else []
        for i in _numbers(active):
            if tests and (scores := tests[i]):
                batch[i].set_user_attr("test_accuracy", scores["accuracy"])
            self._tell(batch[i], population.records[i], objective(plan, population.records[i]))
        self._report(len(batch), time.perf_counter() - started)

    def _tell(self, trial: optuna.Trial, records: Sequence[members.Record], value: float | None) -> None:
        """Records a trial's end: complete with a value, pruned without one."""
        trial.set_user_attr("curve", [[float(f"{number:.6g}") for number in record] for record in records])
        if value is None:
            last = standing(self._definition.plan, records)
            if math.isfinite(last):
                trial.report(last, len(records))  # what TPE ranks it by
            self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self.study.tell(trial, value, skip_if_finished=True)
            self._best = min(self._best, value)

    def _report(self, trained: int, seconds: float) -> None:
        ended = live(self.study.get_trials(deepcopy=False))
        done = sum(trial.state.is_finished() for trial in ended)
        terminal.console.print(
            f"{done}/{self._trials} trials  best {self._definition.plan.objective} {self._best:.5g}  "
            f"{trained} trained in {seconds:.1f} s"
        )


def _numbers(mask: Bool[np.ndarray, " members"]) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask)]
