"""The epoch loop: feeds the compiled steps, validates, records and checkpoints. All input and output is here."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mnist_flax import checkpoint, data, devices, progress, run, train
from mnist_flax.cli import RunError, UserError
from mnist_flax.feed import make_feed
from mnist_flax.model import make_model
from mnist_flax.optimizer import make_schedule

_CALL_SECONDS = 0.5  # aimed at for one compiled call: often enough for a lively bar, rarely enough to cost nothing


class Result(NamedTuple):
    """How training ended."""

    state: train.TrainState  # of the last epoch
    records: list[dict]  # metrics of all epochs
    finished: bool  # False when it was stopped before its end
    train_seconds: float  # in the loop, validation included, compilation not; over all resumptions
    compile_seconds: float  # of this process
    earlier_seconds: float  # of processes that this one resumed
    parameters: int


def fit(
    config: ConfigDict,
    splits: data.Splits,
    num_classes: int,
    directory: Path,
    mesh: Mesh,
    stop: Callable[[], bool],
) -> Result:
    """Trains until the config says so or `stop()` does, from the newest checkpoint in `directory` if there is one.

    The host dispatches a call, then reads the metrics of the call before, so the device never waits for it.

    Raises:
      UserError: the batch does not divide among the devices.
      RunError: the loss became NaN or infinite, or a checkpoint could not be written.
    """
    steps_per_epoch = len(splits.train.labels) // config.batch_size
    if config.batch_size % (mesh.size * config.optimizer.accumulate_steps):
        raise UserError(
            f"config.batch_size={config.batch_size} must be a multiple of the {mesh.size} devices times "
            f"config.optimizer.accumulate_steps={config.optimizer.accumulate_steps}"
        )
    total_steps = steps_per_epoch * config.num_epochs
    hyper = train.hyperparameters(config)
    checkpoints = checkpoint.Checkpoints(directory / run.CHECKPOINTS, config.checkpoint.keep)
    restored = checkpoints.restore_latest(train.abstract_state(config, num_classes, mesh))
    if restored:
        state, extra = restored
        checkpoints.remove_after(int(state.step))
        progress.console.print(f"resuming after step {int(state.step):,} of {total_steps:,}")
    else:
        init = jax.jit(lambda seed: train.init_state(config, num_classes, seed), out_shardings=NamedSharding(mesh, P()))
        state, extra = init(config.seed), {"records": [], "train_seconds": 0.0, "total_seconds": 0.0}
    step = int(state.step)
    records = extra["records"]
    parameters = progress.print_parameters(state.params)
    if step == total_steps or _early_stop(config, records):  # stopped after its last epoch, before its summary
        return Result(state, records, True, extra["train_seconds"], 0.0, extra["total_seconds"], parameters)

    schedule = make_schedule(config.optimizer.schedule, hyper, steps_per_epoch, config.num_epochs)
    train_steps = train.make_train_steps(config, num_classes, steps_per_epoch, mesh)
    evaluate = train.make_evaluate(make_model(config.model, hyper, num_classes), mesh)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    feed = make_feed(config, splits, mesh, step)
    validation = None
    if len(splits.validation.labels):
        validation = train.split_batches(mesh, *splits.validation, config.eval_batch_size)

    limit = 8
    block = feed(step, limit)
    started = time.perf_counter()
    state, _ = train_steps(state, hyper, config.seed, *block[:3], 0, 0)  # compiles, runs no step
    snapshot = copy(state)
    if validation:
        evaluate(snapshot.variables(), *validation)
    jax.block_until_ready(snapshot)
    device = devices.describe(mesh)
    compile_seconds = time.perf_counter() - started
    progress.console.print(f"compiled in {compile_seconds:.1f} s for {mesh.size} x {device['kind']}")

    metrics = run.Metrics(directory, records)
    started = time.perf_counter()
    first_step = step
    clock = _Clock(step)
    pending: _Epoch | None = None  # an epoch that was dispatched and whose metrics are still to be read
    previous: dict[str, Any] | None = None  # metrics of the call before
    stopped_early = False

    def save(state: train.TrainState, step: int, accuracy: float | None) -> None:
        seconds = time.perf_counter() - started
        totals = {key: extra[key] + seconds for key in ("train_seconds", "total_seconds")}
        checkpoints.save(step, state, {"records": list(records), **totals}, accuracy)

    def finish(epoch: _Epoch, bar: progress.Bar) -> None:
        """Reads an epoch's metrics, records them and saves its state."""
        loss, accuracy, step = _read(epoch.metrics)
        number = step // steps_per_epoch
        row = {"step": step, "epoch": number, "split": "train", "loss": loss, "accuracy": accuracy}
        rate = config.batch_size / clock.epoch_seconds_a_step(step)
        seconds = extra["train_seconds"] + time.perf_counter() - started
        row |= {"learning_rate": float(schedule(step - 1)), "images_per_second": rate, "seconds": seconds}
        metrics.append(row)
        line = f"epoch {number:3d}/{config.num_epochs}  train loss {loss:.4f}  accuracy {accuracy:.2%}"
        validation_accuracy = None
        if epoch.validation is not None:
            loss, validation_accuracy = (float(epoch.validation[key]) for key in ("loss", "accuracy"))
            seconds = extra["train_seconds"] + time.perf_counter() - started
            scores = {
                "split": "validation",
                "loss": loss,
                "accuracy": validation_accuracy,
                "seconds": seconds,
            }
            metrics.append({**row, **scores, "images_per_second": None})
            line += f"  validation loss {loss:.4f}  accuracy {validation_accuracy:.2%}"
        bar.update(step, number, loss, accuracy, rate)
        bar.line(f"{line}  {rate:,.0f} images/s  {seconds:.0f} s")
        clock.restart(step)
        save(epoch.state, step, validation_accuracy)

    with progress.bar(total_steps, step) as bar:
        while step < total_steps and not stop():
            state, last = train_steps(state, hyper, config.seed, *block)
            taken = block[4] - block[3]
            step += taken
            if pending:
                finish(pending, bar)
                if _early_stop(config, records):  # the call just dispatched goes to waste
                    state, step, pending, stopped_early = pending.state, int(pending.state.step), None, True
                    break
                pending = None
            elif previous:
                loss, accuracy, done = _read(previous)
                seconds_a_step = clock.seconds_a_step(done)
                bar.update(done, done // steps_per_epoch + 1, loss, accuracy, config.batch_size / seconds_a_step)
                limit = max(1, min(int(_CALL_SECONDS / seconds_a_step), 4 * limit))
            previous = last
            if step % steps_per_epoch == 0:
                snapshot = copy(state)
                scores = evaluate(snapshot.variables(), *validation)[0] if validation else None
                pending, previous = _Epoch(snapshot, last, scores), None
            if step < total_steps:
                block = feed(step, limit)
        if pending:
            finish(pending, bar)
            stopped_early = _early_stop(config, records)
        elif not stopped_early and step > first_step:  # asked to stop within an epoch
            _read({"step": state.step, "sums": state.sums})
            save(state, step, None)
    checkpoints.close()
    metrics.close()
    seconds = time.perf_counter() - started
    return Result(
        state,
        records,
        stopped_early or step == total_steps,
        extra["train_seconds"] + seconds,
        compile_seconds,
        extra["total_seconds"],
        parameters,
    )


class _Epoch(NamedTuple):
    state: train.TrainState
    metrics: dict[str, Any]
    validation: dict[str, Any] | None


class _Clock:
    """Speed of training, between two readings of the device's metrics."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        """An epoch ended, or this process's part of the run begins."""
        self._epoch_time = self._time = time.perf_counter()
        self._epoch_step = self._step = step

    def epoch_seconds_a_step(self, step: int) -> float:
        """Since the restart: as a user waits for it, the validation of the epoch before included."""
        return (time.perf_counter() - self._epoch_time) / max(step - self._epoch_step, 1)

    def seconds_a_step(self, step: int) -> float:
        """Since this was asked last."""
        now = time.perf_counter()
        seconds, self._time = now - self._time, now
        steps, self._step = step - self._step, step
        return max(seconds, 1e-6) / max(steps, 1)


def _read(metrics: dict[str, Any]) -> tuple[float, float, int]:
    """Mean loss, accuracy and step, waiting for the device.

    Raises:
      RunError: the loss is not finite.
    """
    step, sums = int(metrics["step"]), jax.device_get(metrics["sums"])
    if not math.isfinite(sums.loss):
        raise RunError(
            f"the loss became {sums.loss} at step {step}: lower config.optimizer.learning_rate or set "
            "config.optimizer.clip_norm; the last good checkpoint is kept"
        )
    return float(sums.loss / sums.examples), float(sums.correct / sums.examples), step


def _early_stop(config: ConfigDict, records: list[dict]) -> bool:
    """Whether validation accuracy reached its target, or went `patience` epochs without getting better."""
    accuracies = [record["accuracy"] for record in records if record["split"] == "validation"]
    if not accuracies:
        return False
    if config.target_accuracy and accuracies[-1] >= config.target_accuracy:
        return True
    return 0 < config.patience <= len(accuracies) - 1 - accuracies.index(max(accuracies))
