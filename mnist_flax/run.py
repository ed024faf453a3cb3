"""The run directory: what training records, and what every other tool reads."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mnist_flax import config as config_lib
from mnist_flax import durable
from mnist_flax.cli import UserError

_PACKAGES = (
    "mnist_flax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "numpy",
)
CHECKPOINTS, FIGURES, TENSORBOARD = "checkpoints", "figures", "tb"


class Run(NamedTuple):
    """A trained model, read back from its run directory."""

    directory: Path
    config: ConfigDict
    model: Any  # mnist_flax.model.CNN
    variables: dict  # {"params", "batch_stats"}: what model.apply takes
    class_names: tuple[str, ...]


def new_directory(config_name: str, root: Path = Path("runs")) -> Path:
    """A path `runs/<config name>/<UTC time>` that does not exist yet; it is not created."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    candidates = (root / config_name / f"{now}{suffix}" for suffix in ("", *(f".{i}" for i in range(2, 1000))))
    return next(path for path in candidates if not path.exists())


def read_summary(directory: Path) -> dict | None:
    """The summary of a finished run, or None."""
    path = directory / "summary.json"
    return read_json(path) if path.exists() else None


def check_directory(directory: Path, config: ConfigDict) -> None:
    """Refuses a directory that this config can neither start nor resume in.

    Raises:
      UserError: it holds another run, or is no run directory at all.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--workdir={directory} is a file: name a directory")
    recorded = directory / "config.json"
    if recorded.exists():
        changes = config_lib.differences(read_config(directory), config)
        if changes:
            raise UserError(
                f"--workdir={directory} holds a run of another config ({'; '.join(changes)}): use another directory"
            )
    elif directory.exists() and {path.name for path in directory.iterdir()} - {_LOCK, "config.json.tmp"}:
        raise UserError(f"--workdir={directory} is neither empty nor a run directory: use another directory")


_LOCK = ".lock"


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Creates the directory if need be, and holds it for this process; the system lets go when the process ends.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"--workdir={directory} cannot be written ({error.strerror}): use another directory") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in --workdir={directory}: wait for it, or stop it") from None
        yield


def write_config(directory: Path, config: ConfigDict, device: Mapping[str, Any]) -> None:
    """Writes config.json, unless it is there: the config and what it ran on."""
    if not (directory / "config.json").exists():
        environment = {
            "versions": {name: _version(name) for name in _PACKAGES},
            "device": dict(device),
            "git_revision": _git_revision(),
        }
        write_json(directory / "config.json", {"config": config.to_dict(), **environment})


def read_config(directory: Path) -> ConfigDict:
    """The config that a run recorded.

    Raises:
      UserError: there is no run, or its config.json was damaged.
    """
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{directory} is no run directory: it has no config.json")
    recorded = read_json(path)
    fields = recorded.get("config") if isinstance(recorded, dict) else None
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not describe a run: restore it, or train anew in another directory")
    config = config_lib.default_config()
    values = config_lib.flatten(fields)
    for key, default in config_lib.flatten(config).items():
        if isinstance(default, tuple) and isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    try:
        config.unlock()
        config.update_from_flattened_dict(values)
        config.lock()
        config_lib.check(config)
    except (UserError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path} was damaged or is from another version: {' '.join(str(error).split())}") from error
    return config


def load_run(directory: Path | str, which: str | None = None) -> Run:
    """The model of a run, from its `last` or `best` checkpoint; by default the one that the config selects.

    Raises:
      UserError: there is no such run.
      RunError: its checkpoint cannot be read.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not (directory / CHECKPOINTS).is_dir():
        raise UserError(f"{directory} has no checkpoint yet: let the run finish an epoch")
    from mnist_flax import checkpoint, data, devices, model, train

    names = data.CLASS_NAMES[config.dataset]
    abstract = train.abstract_state(config, len(names), devices.make_mesh())
    state, _ = checkpoint.load(directory / CHECKPOINTS, which or config.checkpoint.select, abstract)
    network = model.make_model(config.model, train.hyperparameters(config), len(names))
    return Run(directory, config, network, state.variables(), names)


class Metrics:
    """metrics.jsonl and the TensorBoard file of a run: one record an epoch and split, in order."""

    def __init__(self, directory: Path, text: str):
        """Starts from the lines that a restored checkpoint holds: both files are written anew, and hold no others."""
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        self.text = text  # of metrics.jsonl; put together only once, since a checkpoint takes all of it every epoch
        self.records: list[dict] = [json.loads(line) for line in text.splitlines()]
        self._path = directory / "metrics.jsonl"
        durable.write_text(self._path, text)
        events = directory / TENSORBOARD
        events.mkdir(exist_ok=True)
        for earlier in events.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._began = time.time() - (self.records[-1]["seconds"] if self.records else 0)
        # Written by this thread: the thread of a SummaryWriter keeps lines back for minutes, and dies of a full disk.
        self._tensorboard = event_file_writer.EventsWriter(str(events / "events"), f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # what TensorBoard showed before it forgets
        self._tensorboard.write_event(event_pb2.Event(wall_time=self._began, step=0, session_log=start))
        self._add_to_tensorboard(self.records)

    def append(self, *records: dict) -> None:
        """Adds the records of an epoch; they are on the disk when this returns."""
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        self.records += records
        self.text += lines
        with self._path.open("a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._add_to_tensorboard(records)

    def close(self) -> None:
        self._tensorboard.close()

    def _add_to_tensorboard(self, records: Sequence[dict]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        for record in records:
            for name, value in record.items():
                if name not in ("step", "epoch", "split") and value is not None:
                    scalar = summary.scalar(f"{record['split']}/{name}", value)
                    wall_time = self._began + record["seconds"]
                    self._tensorboard.write_event(Event(wall_time=wall_time, step=record["step"], summary=scalar))
        self._tensorboard.flush()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    durable.write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a clone that was not installed


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
