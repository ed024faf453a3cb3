"""The study directory: what a study is about and where its trials are, for every command that is given its path."""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from ml_collections import ConfigDict

from mnist_flax.experiments.research import space, storage
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import run_dir
from mnist_flax.runtime.cli import UserError

# What a study directory may hold, also half written; anything else is not ours to write beside.
_OURS = {
    *(".lock", "config.json", "study.json", "study.db", "study.db.lock", "study.db-journal"),
    *("winner.py", "__pycache__", "confirmation.json", "report.html", "figures"),
}
_UNSOUND = (KeyError, TypeError, ValueError, AttributeError)


class StudyRecord(NamedTuple):
    """What a study directory says of its study."""

    name: str
    storage: str  # in study.json null where it is the directory's own, which may be moved or copied
    config: ConfigDict  # that all trials start from
    plan: space.Plan
    scales: dict[str, dict]  # of each range of the space: kind, low, high, log, values


def prepare(place: Path, definition: space.Definition, url: str | None) -> StudyRecord:
    """Writes what is not there yet, and reads the rest.

    Raises:
      UserError: the directory holds something else, cannot be written, or its study lies in another storage.
    """
    url = storage.absolute(url) if url else None
    if place.exists() and (not place.is_dir() or {path.name.removesuffix(".tmp") for path in place.iterdir()} - _OURS):
        raise UserError(f"{place} is neither empty nor a study directory: use another directory")
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): use another directory") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first of several workers writes
        if not (place / "study.json").exists():
            scales = {key: asdict(dimension) for key, dimension in definition.space.items()}
            details: dict[str, Any] = {"name": place.resolve().name, "storage": storage.public(url) if url else None}
            details |= {"plan": asdict(definition.plan), "space": scales}
            try:
                _parse(json.loads(json.dumps(details)), definition.config, place)  # or it could never be read again
            except _UNSOUND as error:
                raise UserError(f"the study's plan or space cannot be written down: {error}") from error
            storage.connect(url or storage.default_url(place), heartbeat=60)  # before anything is written
            run_dir.write_json(place / "config.json", {"config": definition.config.to_dict()})
            run_dir.write_json(place / "study.json", details)
    record = read(place)
    if url and storage.public(url) != storage.public(storage.absolute(record.storage)):
        raise UserError(f"{place} is a study in {record.storage}: use another directory for {storage.public(url)}")
    return record._replace(storage=url or record.storage)


def read(place: Path) -> StudyRecord:
    """Raises UserError if there is no study, or it was damaged."""
    if not (place / "study.json").exists():
        raise UserError(f"{place} is no study directory: it has no study.json")
    details = run_dir.read_json(place / "study.json")
    config = run_dir.read_config(place)
    try:
        return _parse(details, config, place)
    except _UNSOUND as error:
        raise UserError(f"{place / 'study.json'} was damaged or is from another version") from error


def _parse(details: Any, config: ConfigDict, place: Path) -> StudyRecord:
    """The record that study.json holds; raises one of _UNSOUND if it holds none."""
    plan = space.Plan(**{**details["plan"], "scientific": tuple(details["plan"]["scientific"])})
    name, url, scales = details["name"], details["storage"], dict(details["space"])
    _check(name, url, plan, scales, set(config_lib.flatten(config)))
    return StudyRecord(name, storage.default_url(place) if url is None else url, config, plan, scales)


def _check(name: Any, url: Any, plan: space.Plan, scales: Mapping[str, Any], fields: set[str]) -> None:
    """Raises ValueError for what `prepare` would never have written."""
    texts = all(isinstance(text, str) for text in (name, plan.question)) and name and isinstance(url, str | None)
    known = plan.objective in space.OBJECTIVES and plan.sampler in space.SAMPLERS and set(plan.scientific) <= fields
    numbers = all(
        isinstance(number, int | float) for number in (plan.target, plan.evaluations, plan.repeats, plan.rounds)
    )
    if not (texts and known and numbers and scales and scales.keys() <= fields):
        raise ValueError("a field that cannot be")
    for scale in scales.values():
        if scale["kind"] == "choice":
            sound = scale["values"] and all(map(_is_choice, scale["values"]))
        else:
            sound = scale["kind"] in ("log_uniform", "uniform", "integer") and isinstance(scale["log"], bool)
            sound = sound and (space.LEAST if scale["log"] else -1e300) < scale["low"] < scale["high"] < 1e300
        if not sound:
            raise ValueError("a range that cannot be")
        if scale["condition"] is not None:
            parent, values = scale["condition"]
            if parent not in scales or not all(map(_is_choice, values)):
                raise ValueError("a condition that cannot be")


def _is_choice(value: Any) -> bool:
    """Whether a config field can have this value: a name, a number or a list of numbers."""
    if isinstance(value, list):
        return all(isinstance(entry, int) for entry in value)
    if isinstance(value, str):
        return value.isidentifier()
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)


def read_confirmation(place: Path) -> dict[str, Any] | None:
    """What a confirmation found, or None where there was none.

    Raises:
      UserError: confirmation.json was damaged.
    """
    path = place / "confirmation.json"
    if not path.exists():
        return None
    found = run_dir.read_json(path)
    try:
        sound = all(isinstance(seed, int) for seed in found["seeds"]) and len(found["seeds"]) >= 2
        for score in ("test_accuracy", "objective_value"):
            for role in ("winner", "baseline", "difference"):
                scores = found[score][role]
                numbers = [*scores["values"], scores["mean"], scores["half_interval"], scores["deviation"]]
                sound = sound and len(scores["values"]) == len(found["seeds"])
                sound = sound and all(isinstance(n, int | float) and abs(n) < 1e300 for n in numbers)
        if not sound:
            raise ValueError("scores that cannot be")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} was damaged: delete it, and confirm the study again") from error
    return found


def open_study(record: StudyRecord, database: optuna.storages.RDBStorage) -> optuna.Study:
    """Raises UserError if the storage has no such study."""
    try:
        return optuna.load_study(study_name=record.name, storage=database)
    except KeyError:
        raise UserError(f"{record.storage} has no study {record.name!r}: run its study command") from None
