"""Checkpoints of a run: saved in the background, latest and best kept; the only file that knows Orbax's API."""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mnist_flax.runtime import files
from mnist_flax.runtime.cli import RunError, UserError, option, reason
from mnist_flax.runtime.settings import pinned

# Ten years: Orbax measures how long a save takes by the time of day, which jumps when a machine was suspended.
_NO_TIMEOUT = 10 * 365 * 86_400


class _Misfit(ValueError):
    """A checkpoint of another config or version than it is to be restored into; it may well be whole."""


class Checkpoints:
    """The checkpoints under one directory, by step.

    A checkpoint holds a state (any pytree of arrays) and `extra`, a JSON object. The `keep` latest are kept and the one
    with the best validation accuracy; none goes before a later one has reached the disk. A digest of the state goes
    with it, so that damage is found when it is read.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory = directory.absolute()  # Orbax wants it so
        self._background = ThreadPoolExecutor(1)
        self._pending: Future | None = None  # the save under way
        self._keep = keep
        self._durable: int | None = None  # newest step that is known to be on the disk
        self._orbax = ocp.training.Checkpointer(
            self._directory,
            context=ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=_NO_TIMEOUT)),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=self,
            cleanup_tmp_directories=True,  # what a killed process left half written
        )
        self._scores = _scores(self._orbax)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's protocol: which of the checkpoints stay."""
        best = _best(self._scores)
        latest = {checkpoint.step for checkpoint in checkpoints[-self._keep :]}
        # Until the newest has reached the disk, a power cut would go back to the one before it.
        kept = latest | {best, self._durable}
        return [checkpoint.step in kept for checkpoint in checkpoints]

    @pinned()
    def save(self, step: int, state: Any, extra: dict, accuracy: float | None) -> None:
        """Starts saving in the background, after the save before it has ended.

        `accuracy` on validation data ranks the checkpoint; NaN ranks last, and None not at all.

        Raises:
          RunError: the save before this one failed (a full disk, say).
        """
        self.wait()
        if accuracy is not None:
            accuracy = -1.0 if math.isnan(accuracy) else accuracy
            self._scores[step] = accuracy
        response = self._orbax.save_async(
            step,
            jax.device_get(state),
            overwrite=True,  # a step is saved anew after a fall-back to an earlier one
            custom_metadata={"extra": extra, "accuracy": accuracy, "digest": _digest(state, extra)},
        )
        self._pending = self._background.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        """Waits for Orbax, which renames what it wrote but does not flush it, and flushes it."""
        response.result()
        if jax.process_index() == 0:
            files.sync_tree(self._directory / str(step))
        self._durable = step

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          RunError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise RunError(
                    f"a checkpoint could not be written to {self._directory} ({reason(error)}): "
                    "put that right and run the same command again, it goes on from the checkpoint before"
                ) from error

    def restore_latest(self, abstract_state: Callable[[], Any]) -> tuple[Any, dict] | None:
        """The newest undamaged checkpoint as (state, extra), or None; warns of damaged ones and removes them.

        Those of a run are alike: one that does not fit is damaged if an earlier one does fit.

        `abstract_state` gives what it is restored into; it is not asked where there is no checkpoint.

        Raises:
          RunError: there are checkpoints, and none can be read.
        """
        checkpoints = list(self._orbax.checkpoints)
        if not checkpoints:
            return None
        abstract = abstract_state()
        failures: list[tuple[int, Exception]] = []
        for checkpoint in reversed(checkpoints):
            try:
                restored = _load(self._orbax, checkpoint.step, abstract)
            except Exception as error:
                failures.append((checkpoint.step, error))
            else:
                for step, failure in failures:
                    said = reason(failure)
                    logging.warning("Checkpoint %d is damaged, falling back to the one before: %s", step, said)
                if jax.process_index() == 0:
                    files.sync_tree(self._directory / str(checkpoint.step))  # if its writer died before it did so
                self._durable = checkpoint.step
                self._remove_after(checkpoint.step)
                return restored
        why = next((failure for _, failure in failures if isinstance(failure, _Misfit)), failures[0][1])
        way = "go on with the version that wrote them" if isinstance(why, _Misfit) else "restore them from a copy"
        raise RunError(
            f"no checkpoint in {self._directory} can be read ({reason(why)}): {way}, or train in another directory"
        ) from why

    def _remove_after(self, step: int) -> None:
        for checkpoint in self._orbax.checkpoints:
            if checkpoint.step > step:
                self._scores.pop(checkpoint.step, None)
                if jax.process_index() == 0:
                    shutil.rmtree(self._directory / str(checkpoint.step), ignore_errors=True)
        multihost_utils.sync_global_devices("damaged checkpoints are removed")
        self._orbax.reload()

    def close(self) -> None:
        """Waits for the last save, and removes what was kept only until then."""
        self.wait()
        checkpoints = self._orbax.checkpoints
        for checkpoint, kept in zip(checkpoints, self.should_preserve(checkpoints, context=None), strict=True):
            if not kept:
                self._orbax.delete(checkpoint.step)
        self._orbax.close()
        self._background.shutdown()


@pinned()
def load(directory: Path, which: str, abstract_state: Any) -> tuple[Any, dict]:
    """The `last` or the `best` checkpoint under `directory` as (state, extra), for reading only.

    Raises:
      UserError: none has a validation accuracy, so that there is no best one.
      RunError: there is none, or it is damaged, or of another version.
    """
    with ocp.training.Checkpointer(directory.absolute()) as orbax:
        if not orbax.checkpoints:
            raise RunError(f"no checkpoint in {directory}: has the run finished its first epoch?")
        step = _step(orbax, which)
        if step is None:
            raise UserError(
                f"no checkpoint in {directory} has a validation accuracy: use {option('checkpoint', 'last')}"
            )
        try:
            return _load(orbax, step, abstract_state)
        except _Misfit as error:
            raise RunError(
                f"checkpoint {step} in {directory} is of another version ({error}): use the version that wrote it"
            ) from error
        except Exception as error:
            other = "last" if which == "best" else "best"
            way = "make it anew in another directory"
            if another := _step(orbax, other):
                with contextlib.suppress(Exception):  # it may be damaged too, or the same
                    _load(orbax, another, abstract_state)
                    way = f"{option('checkpoint', other)} can be"
            raise RunError(f"checkpoint {step} in {directory} cannot be read ({reason(error)}): {way}") from error


def _step(orbax: ocp.training.Checkpointer, which: str) -> int | None:
    """The step of the `last` or the `best` checkpoint; None if none has a validation accuracy."""
    if which == "last":
        return max(checkpoint.step for checkpoint in orbax.checkpoints)
    return _best(_scores(orbax))


def _best(scores: dict[int, float]) -> int | None:
    """The step of the best score, of equal ones the latest."""
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _load(orbax: ocp.training.Checkpointer, step: int, abstract_state: Any) -> tuple[Any, dict]:
    described = orbax.metadata(step)
    found, wanted = _kinds(described.metadata), _kinds(abstract_state)
    if different := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        name = different[0]  # Orbax would find out only while it reads, and say so at great length
        raise _Misfit(f"{name} is {found.get(name)} in it and {wanted.get(name)} in a run of this config")
    state = orbax.load(step, abstract_state)
    metadata = described.custom_metadata
    if metadata["digest"] != _digest(state, metadata["extra"]):
        raise ValueError("its content is not what was saved")
    return state, metadata["extra"]


def _kinds(tree: Any) -> dict[str, str]:
    """Type and shape of every array, by its place in the tree, whether Orbax describes it or JAX."""
    kinds = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = (getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None))) for entry in path)
        kinds["/".join(map(str, keys))] = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    return kinds


def _scores(orbax: ocp.training.Checkpointer) -> dict[int, float]:
    """Validation accuracy of each checkpoint that has one and can be read."""
    scores = {}
    for checkpoint in orbax.checkpoints:
        with contextlib.suppress(Exception):  # damaged: it cannot be the best
            accuracy = orbax.metadata(checkpoint.step).custom_metadata["accuracy"]
            if isinstance(accuracy, int | float):
                scores[checkpoint.step] = float(accuracy)
    return scores


def _digest(state: Any, extra: dict) -> str:
    """BLAKE2 of every array with its place in the tree, and of the rest; Orbax would not notice a flipped bit."""
    digest = hashlib.blake2b(json.dumps(extra, sort_keys=True).encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
