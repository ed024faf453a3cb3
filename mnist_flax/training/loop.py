"""The epoch loop: feeds the compiled steps, validates, records and checkpoints. All input and output is here."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from rich.console import Console

from mnist_flax.data import datasets
from mnist_flax.data.feed import Block, make_feed
from mnist_flax.models.cnn import make_model
from mnist_flax.runtime import devices, distributed, metrics_log, run_dir, terminal
from mnist_flax.runtime.cli import RunError, UserError, option
from mnist_flax.runtime.settings import pinned
from mnist_flax.training import checkpoint, debug, scoring
from mnist_flax.training.optimizer import make_schedule
from mnist_flax.training.state import TrainState, abstract_state, all_finite, hyperparameters, init_state
from mnist_flax.training.step import make_train_steps

_CALL_SECONDS = 0.5  # aimed at for one compiled call: often enough for a lively bar, rarely enough to cost nothing
_CALL_STEPS = 8  # at least, and until the speed is known: a call gets its memory from the system anew


class Result(NamedTuple):
    """How training ended."""

    state: TrainState  # of the last epoch
    records: list[dict]  # metrics of all epochs
    finished: bool  # False when it was stopped before its end
    parameters: int
    compile_seconds: float  # of this process
    train_seconds: float  # in the loop, validation included, compilation not; over all processes of the run
    earlier_seconds: float  # that processes before this one trained


class _Epoch(NamedTuple):
    """An epoch that was dispatched, and whose metrics are still to be read from the device."""

    state: TrainState
    metrics: dict[str, Any]
    validation: dict[str, Any] | None
    finite: jax.Array  # whether all of the state is


class _Programs(NamedTuple):
    """What a run computes on the devices, as compiled functions."""

    train_steps: Callable  # (state, block) -> (state, metrics); takes the state away
    copy: Callable  # state -> (a copy, whether all of it is finite)
    validate: Callable  # state -> loss and accuracy; None without validation examples


@pinned()
def fit(
    config: ConfigDict,
    splits: datasets.Splits,
    num_classes: int,
    directory: Path,
    mesh: Mesh,
    stop: Callable[[], bool],
    console: Console = terminal.QUIET,
) -> Result:
    """Trains until the config says so or `stop()` does, from the newest checkpoint in `directory` if there is one.

    The host dispatches a call, then reads the metrics of the call before, so the device never waits for it.

    With several processes all do this together; the first one shows and records it.

    Raises:
      UserError: the run was begun by a version that recorded other things.
      RunError: the loss became NaN or infinite, or a checkpoint could not be written.
    """
    stop()  # from here on a signal waits until there is something to save
    steps_per_epoch = len(splits.train.labels) // config.batch_size
    total_steps = steps_per_epoch * config.num_epochs
    checkpoints = checkpoint.Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint.keep)
    state, extra = _start(config, num_classes, checkpoints, mesh)
    step = first_step = int(state.step)
    parameters = terminal.print_parameters(state.params, console)
    if step:
        console.print(f"resuming after step {step:,} of {total_steps:,}")
    if "metrics" not in extra:
        raise UserError(f"{directory} was begun by an earlier version: finish it with that one, or train in another")
    earlier_seconds = extra["train_seconds"]
    metrics = metrics_log.Metrics(directory if distributed.is_first() else None, extra["metrics"])
    if step == total_steps or _early_stop(config, metrics.records):  # ended after its last epoch, without a summary
        checkpoints.close()
        metrics.close()
        return Result(state, metrics.records, True, parameters, 0.0, earlier_seconds, earlier_seconds)

    programs = _make_programs(config, splits, num_classes, steps_per_epoch, mesh)
    feed = make_feed(config, splits, mesh, step)
    vote = distributed.StopConsensus(mesh)
    limit = _CALL_STEPS
    block = feed(step, limit)
    state, compile_seconds = _compile(programs, state, block)
    console.print(f"compiled in {compile_seconds:.1f} s for {mesh.size} x {devices.describe(mesh)['kind']}")

    pending: _Epoch | None = None
    previous: dict[str, Any] | None = None  # metrics of the call before
    ended = stopping = False
    with terminal.bar(total_steps, step, console) as bar:
        log = _Log(config, metrics, checkpoints, earlier_seconds, steps_per_epoch, step, bar)
        while step < total_steps and not stopping:
            state, last = programs.train_steps(state, block)
            step += block.stop - block.start
            if pending:
                log.finish(pending)
                if ended := _early_stop(config, metrics.records):  # the call just dispatched goes to waste
                    state, pending = pending.state, None
                    break
                pending = None
            elif previous:
                limit = max(_CALL_STEPS, min(int(_CALL_SECONDS / log.show(previous)), 4 * limit))
            previous = last
            if step % steps_per_epoch == 0:
                pending, previous = _end_epoch(programs, state, last), None
            if step < total_steps:
                stopping, limit = vote(stop(), limit)
                block = feed(step, limit)
        if pending:
            log.finish(pending)
            ended = step == total_steps or _early_stop(config, metrics.records)
        elif not ended and step > first_step:  # asked to stop within an epoch
            _read(last)
            _check_finite(programs.copy(state)[1], step)
            log.save(state, step, None)
        log.close()
    return Result(state, metrics.records, ended, parameters, compile_seconds, log.seconds(), earlier_seconds)


def _make_programs(
    config: ConfigDict, splits: datasets.Splits, num_classes: int, steps_per_epoch: int, mesh: Mesh
) -> _Programs:
    hyper = hyperparameters(config)
    train_steps = make_train_steps(config, num_classes, steps_per_epoch, mesh)
    if config.debug:
        train_steps = debug.checked(train_steps, config, num_classes, steps_per_epoch, mesh)
    evaluate = scoring.make_evaluate(make_model(config.model, hyper, num_classes), mesh)
    held_out = len(splits.validation.labels)
    batches = held_out and scoring.split_batches(mesh, *splits.validation, min(config.eval_batch_size, held_out))
    return _Programs(
        train_steps=lambda state, block: train_steps(state, hyper, config.seed, block),
        copy=jax.jit(lambda state: (jax.tree.map(jnp.copy, state), all_finite(state))),
        validate=lambda state: evaluate(state.variables(), *batches)[0] if batches else None,
    )


def _compile(programs: _Programs, state: TrainState, block: Block) -> tuple[TrainState, float]:
    """The same state, and the seconds that compiling took: training is timed without them."""
    started = time.perf_counter()
    state, _ = programs.train_steps(state, block._replace(start=0, stop=0))  # compiles, runs no step
    copy, _ = programs.copy(state)
    programs.validate(copy)
    # What a device prepares before it first takes a step is no training either: this one is from a copy.
    jax.block_until_ready(programs.train_steps(copy, block._replace(start=0, stop=1)))
    return state, time.perf_counter() - started


def _end_epoch(programs: _Programs, state: TrainState, metrics: dict[str, Any]) -> _Epoch:
    """Dispatches what an epoch ends with, from a copy: the next call takes the state away."""
    copy, finite = programs.copy(state)
    return _Epoch(copy, metrics, programs.validate(copy), finite)


def _start(
    config: ConfigDict, num_classes: int, checkpoints: checkpoint.Checkpoints, mesh: Mesh
) -> tuple[TrainState, dict]:
    """State and record of the newest checkpoint, or fresh ones."""
    restored = checkpoints.restore_latest(lambda: abstract_state(config, num_classes, mesh))
    if restored:
        return restored
    init = jax.jit(
        lambda seed: init_state(config, num_classes, seed), out_shardings=NamedSharding(mesh, devices.REPLICATED)
    )
    return init(config.seed), {"metrics": "", "train_seconds": 0.0}


class _Log:
    """What is kept and shown of a run while it trains: metrics, checkpoints, the clock and the bar."""

    def __init__(
        self,
        config: ConfigDict,
        metrics: metrics_log.Metrics,
        checkpoints: checkpoint.Checkpoints,
        earlier_seconds: float,
        steps_per_epoch: int,
        step: int,
        bar: terminal.Bar,
    ):
        self._config, self._metrics, self._checkpoints, self._bar = config, metrics, checkpoints, bar
        self._steps_per_epoch = steps_per_epoch
        hyper = hyperparameters(config)
        # One compiled program: each of its operations alone would be compiled too, for as long.
        self._schedule = jax.jit(make_schedule(config.optimizer.schedule, hyper, steps_per_epoch))
        now = time.perf_counter()
        self._started = now - earlier_seconds
        self._shown = self._finished = (now, step)

    def seconds(self) -> float:
        """Time spent in training, over all processes of the run."""
        return time.perf_counter() - self._started

    def show(self, metrics: dict[str, Any]) -> float:
        """Moves the bar; gives the seconds that a step took since the last time."""
        loss, accuracy, step = _read(metrics)
        rate = self._steps_per_second(self._shown, step)
        self._shown = (time.perf_counter(), step)
        self._bar.update(step, step // self._steps_per_epoch + 1, loss, accuracy, rate * self._config.batch_size)
        return 1 / rate

    def finish(self, epoch: _Epoch) -> None:
        """Reads an epoch's metrics, records them and saves its state."""
        loss, accuracy, step = _read(epoch.metrics)
        _check_finite(epoch.finite, step)
        number = step // self._steps_per_epoch
        # As a user waits for it: the validation of the epoch before included.
        rate = self._steps_per_second(self._finished, step) * self._config.batch_size
        self._shown = self._finished = (time.perf_counter(), step)
        place = {"step": step, "epoch": number}
        learning_rate = float(self._schedule(step - 1))
        records = [self._record(place, "train", loss, accuracy, learning_rate, rate)]
        self._bar.update(step, number, loss, accuracy, rate)
        line = f"epoch {number:3d}/{self._config.num_epochs}  train loss {loss:.4f}  accuracy {accuracy:.2%}"
        validation_accuracy = None
        if epoch.validation is not None:
            loss, validation_accuracy = (float(epoch.validation[key]) for key in ("loss", "accuracy"))
            if not math.isfinite(loss):
                raise _diverged(f"the validation loss became {loss}", step)
            records.append(self._record(place, "validation", loss, validation_accuracy, learning_rate, None))
            line += f"  validation loss {loss:.4f}  accuracy {validation_accuracy:.2%}"
        self._metrics.append(*records)
        self._bar.line(f"{line}  {rate:,.0f} images/s  {self.seconds():.0f} s")
        self.save(epoch.state, step, validation_accuracy)

    def save(self, state: TrainState, step: int, accuracy: float | None) -> None:
        extra = {"metrics": self._metrics.text, "train_seconds": self.seconds()}
        self._checkpoints.save(step, state, extra, accuracy)

    def close(self) -> None:
        self._checkpoints.close()
        self._metrics.close()

    def _record(
        self, place: dict, split: str, loss: float, accuracy: float, learning_rate: float, rate: float | None
    ) -> dict:
        scores = {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
        return {**place, "split": split, **scores, "images_per_second": rate, "seconds": self.seconds()}

    @staticmethod
    def _steps_per_second(since: tuple[float, int], step: int) -> float:
        then, step_then = since
        return max(step - step_then, 1) / max(time.perf_counter() - then, 1e-6)


def _read(metrics: dict[str, Any]) -> tuple[float, float, int]:
    """Mean loss, accuracy and step, waiting for the device.

    Raises:
      RunError: the loss is not finite.
    """
    step, sums = int(metrics["step"]), jax.device_get(metrics["sums"])
    if not math.isfinite(sums.loss):
        raise _diverged(f"the loss became {sums.loss}", step)
    return float(sums.loss / sums.examples), float(sums.correct / sums.examples), step


def _check_finite(finite: jax.Array, step: int) -> None:
    """Raises RunError unless all of a state is finite: a gradient may overflow where the loss does not show it."""
    if not finite:
        raise _diverged("parameters or the optimizer's averages became NaN or infinite", step)


def _diverged(what: str, step: int) -> RunError:
    return RunError(
        f"{what} at step {step}: lower config.optimizer.learning_rate or set config.optimizer.clip_norm; the last "
        f"good checkpoint is kept, and the same command with {option('config.debug', 'true')} names the layer"
    )


def _early_stop(config: ConfigDict, records: list[dict]) -> bool:
    """Whether validation accuracy reached its target, or went `patience` epochs without getting better."""
    accuracies = [record["accuracy"] for record in records if record["split"] == "validation"]
    if not accuracies:
        return False
    if config.target_accuracy and accuracies[-1] >= config.target_accuracy:
        return True
    return 0 < config.patience <= len(accuracies) - 1 - accuracies.index(max(accuracies))
