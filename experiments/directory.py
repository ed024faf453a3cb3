"""The study directory: what a study is about and where its trials are, for every command that is given its path."""

import fcntl
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import optuna
from ml_collections import ConfigDict

from experiments import space, storage
from mnist_flax import run
from mnist_flax.cli import UserError

# What a study directory may hold; anything else is not ours to write beside.
_OURS = {
    *(".lock", "config.json", "study.json", "study.db", "study.db.lock", "study.db-journal"),
    *("winner.py", "__pycache__", "confirmation.json", "report.html", "figures"),
}


class Record(NamedTuple):
    """What a study directory says of its study."""

    name: str
    storage: str
    config: ConfigDict  # that all trials start from
    plan: space.Plan
    scales: dict[str, dict]  # of each range of the space: kind, low, high, log, values


def prepare(place: Path, definition: space.Definition, url: str | None) -> Record:
    """Writes what is not there yet, and reads the rest.

    Raises:
      UserError: the directory holds something else, cannot be written, or its study lies in another storage.
    """
    if place.exists() and (not place.is_dir() or {path.name for path in place.iterdir()} - _OURS):
        raise UserError(f"--workdir={place} is neither empty nor a study directory: use another directory")
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={place} cannot be written ({error.strerror}): use another directory") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first of several workers writes
        if not (place / "study.json").exists():
            wanted = url or storage.default_url(place)
            storage.connect(wanted, heartbeat=60)  # before anything is written
            run.write_json(place / "config.json", {"config": definition.config.to_dict()})
            scales = {key: asdict(dimension) for key, dimension in definition.space.items()}
            details = {"name": place.resolve().name, "storage": storage.public(wanted), "plan": asdict(definition.plan)}
            run.write_json(place / "study.json", details | {"space": scales})
    record = read(place)
    if url and storage.public(url) != record.storage:
        raise UserError(
            f"{place} is a study in {record.storage}: use another --workdir for --storage={storage.public(url)}"
        )
    return record._replace(storage=url or record.storage)


def read(place: Path) -> Record:
    """Raises UserError if there is no study, or it was damaged."""
    if not (place / "study.json").exists():
        raise UserError(f"{place} is no study directory: it has no study.json")
    details = run.read_json(place / "study.json")
    try:
        plan = space.Plan(**{**details["plan"], "scientific": tuple(details["plan"]["scientific"])})
        name, url, scales = details["name"], details["storage"], dict(details["space"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place / 'study.json'} was damaged or is from another version") from error
    return Record(name, url, run.read_config(place), plan, scales)


def open_study(record: Record, database: optuna.storages.RDBStorage) -> optuna.Study:
    """Raises UserError if the storage has no such study."""
    try:
        return optuna.load_study(study_name=record.name, storage=database)
    except KeyError:
        raise UserError(f"{record.storage} has no study {record.name!r}: run its study command") from None
