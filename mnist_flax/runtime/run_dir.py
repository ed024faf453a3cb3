"""The run directory: what training records, and what every other tool reads."""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import files
from mnist_flax.runtime.cli import UserError

_PACKAGES = "mnist_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy"
CHECKPOINTS, FIGURES, TENSORBOARD = "checkpoints", "figures", "tb"
# What is about the model of a finished run, which a longer one replaces; the first means: finished.
_RESULTS = "summary.json", "report.html", "evaluation_*.json", "robustness*.json", f"{FIGURES}/*", "export/*"
MOST_JSON = 2**26  # bytes of a file that is read whole: far more than a run writes
MOST_MEMBERS = 1_000  # of an ensemble


def new_directory(config_name: str, root: Path = Path("runs")) -> Path:
    """A path `runs/<config name>/<UTC time>`, to the microsecond: runs started at once differ. It is not created."""
    return root / config_name / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ")


def distinct(names: Sequence[str]) -> list[Path]:
    """Run directories as absolute paths; raises UserError if one is named more than once."""
    paths = [Path(name).resolve() for name in names]
    if len(set(paths)) < len(paths):
        raise UserError(f"{max(paths, key=paths.count)} is named more than once: name each run once")
    return paths


def read_summary(directory: Path) -> dict | None:
    """The summary of a finished run, or None.

    Raises:
      UserError: it is damaged: not an object of texts and finite numbers, or a share or a time that cannot be.
    """
    path = directory / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path)
    whole = isinstance(summary, dict) and {"dataset", "device", "seed"} <= summary.keys()
    if not whole or not all(_can_be(name, value) for name, value in summary.items()):
        raise UserError(f"{path} is damaged: restore it, or delete it and run the training command again")
    return summary


def _can_be(name: str, value: Any) -> bool:
    """Whether a field of summary.json has a value that the other tools can show, and a terminal can print."""
    if not (name.isprintable() and str(value).isprintable()):
        return False
    if name in ("dataset", "device"):
        return isinstance(value, str)
    if value is None:
        return name in ("train_accuracy", "validation_accuracy")  # of a split that has no example
    if isinstance(value, bool | str):
        return not name.endswith(("accuracy", "seconds")) and name not in ("seed", "parameters", "steps", "epochs")
    if not isinstance(value, int | float) or not abs(value) <= 2**63 or not math.isfinite(value):
        return False
    return 0 <= value <= 1 if name.endswith("accuracy") else value >= 0 or not name.endswith("seconds")


def check_directory(directory: Path, config: ConfigDict) -> None:
    """Refuses a directory that this config can neither start nor resume in, nor extend the run of.

    Raises:
      UserError: it holds another run, or is no run directory at all.
    """
    if not is_recorded(directory, "a run directory"):
        return
    if read_members(directory):
        raise UserError(f"{directory} holds an ensemble: use another directory")
    recorded = read_config(directory)
    changes = config_lib.differences(recorded, config)
    if len(changes) == 1 and recorded.num_epochs < config.num_epochs:
        if field := _spread_over_epochs(config):
            raise UserError(
                f"{directory} holds a run of {recorded.num_epochs} epochs, and {field} depends on "
                f"config.num_epochs, so that one of {config.num_epochs} differs from its start: use another directory"
            )
    elif changes:
        raise UserError(f"{directory} holds a run of another config ({'; '.join(changes)}): use another directory")


def _spread_over_epochs(config: ConfigDict) -> str | None:
    """The field that makes the first steps of training depend on `num_epochs`, if one does."""
    if config.optimizer.schedule in ("cosine", "one_cycle"):
        return f"config.optimizer.schedule={config.optimizer.schedule}"
    if config.augment.final_epochs > 0:
        return f"config.augment.final_epochs={config.augment.final_epochs:g}"
    return None


def read_finished(directory: Path, config: ConfigDict) -> dict | None:
    """The summary of the run in a directory, or None where this config has still to train it.

    Raises what `check_directory` and `read_summary` do.
    """
    check_directory(directory, config)
    summary = read_summary(directory)
    return summary if summary and read_config(directory).num_epochs == config.num_epochs else None


def extend(directory: Path, config: ConfigDict) -> int | None:
    """Has the run in a directory go on to `config.num_epochs`; gives its earlier `num_epochs` if that was another.

    Its results go to `after_N_epochs`, the summary first: wherever this is cut off, what is left is an unfinished run,
    either of the old length or of the new one.
    """
    path = directory / "config.json"
    if not path.exists() or (earlier := read_config(directory).num_epochs) == config.num_epochs:
        return None
    for result in (found for pattern in _RESULTS for found in sorted(directory.glob(pattern))):
        kept = directory / f"after_{earlier}_epochs" / result.relative_to(directory)
        kept.parent.mkdir(parents=True, exist_ok=True)
        result.replace(kept)
        files.sync(kept.parent)
        files.sync(result.parent)
    recorded = read_recorded(directory)
    recorded["config"]["num_epochs"] = config.num_epochs
    write_json(path, recorded)
    return earlier


def test_scorings(directory: Path) -> int:
    """How often the test split was scored for a summary of the run, before it was extended."""
    return len(list(directory.glob("after_*_epochs/summary.json")))


def suffix(which: Mapping[str, str], **usual: str) -> str:
    """What the name of a file of results ends with: a part for each of `which` that is not the `usual` one."""
    return "".join(f"_{which[kind]}" for kind, name in usual.items() if which[kind] != name)


def is_recorded(directory: Path, kind: str) -> bool:
    """Whether there is a config.json; raises UserError for a file, or a directory of other things (no `kind`)."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a directory")
    recorded = (directory / "config.json").exists()
    if not recorded and directory.exists() and {path.name for path in directory.iterdir()} - _UNRECORDED:
        raise UserError(f"{directory} is neither empty nor {kind}: use another directory")
    return recorded


_LOCK = ".lock"
_UNRECORDED = {_LOCK, "config.json.tmp"}  # what may be there before config.json


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Creates the directory if need be, and holds it for this process; the system lets go when the process ends.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("a")
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}): use another directory") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {directory}: wait for it, or stop it") from None
        yield


def is_claimed(directory: Path) -> bool:
    """Whether a process holds the directory just now."""
    try:
        with (directory / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever has
        pass
    return False


def write_config(
    directory: Path, config: ConfigDict, device: Mapping[str, Any], members: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Writes config.json, unless that of a run is there: the config and what it ran on.

    `members` are an ensemble's, as `ensemble.read_member` gives them.
    """
    if members or not (directory / "config.json").exists():
        environment = {
            "versions": {name: _version(name) for name in _PACKAGES},
            "device": dict(device),
            "git_revision": _git_revision(),
        }
        ensemble = {"members": list(members)} if members else {}
        write_json(directory / "config.json", {"config": config.to_dict(), **environment, **ensemble})


def read_config(directory: Path) -> ConfigDict:
    """The config that a run recorded.

    Raises:
      UserError: there is no run, or its config.json was damaged.
    """
    return _config(directory, read_recorded(directory)["config"])


def read_members(directory: Path) -> list[dict[str, Any]]:
    """What an ensemble recorded of its members: path, seed, test_accuracy, config (a ConfigDict); [] for a run.

    Raises:
      UserError: there is neither, or its config.json was damaged.
    """
    members = read_recorded(directory).get("members", [])
    kinds = {"path": str, "seed": int, "test_accuracy": float}
    try:
        if len(members) > MOST_MEMBERS:
            raise ValueError(f"more than {MOST_MEMBERS} members")
        if any(type(member[name]) is not kind for member in members for name, kind in kinds.items()):
            raise TypeError("a field of another type")
        return [
            {name: member[name] for name in kinds} | {"config": _config(directory, member["config"])}
            for member in members
        ]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{directory / 'config.json'} was damaged: make the ensemble anew elsewhere") from error


def read_recorded(directory: Path) -> dict[str, Any]:
    """All of config.json.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{directory} is no run directory: it has no config.json")
    recorded = read_json(path)
    if not isinstance(recorded, dict) or not isinstance(recorded.get("config"), dict):
        raise UserError(f"{path} does not describe a run: restore it, or train anew in another directory")
    return recorded


def _config(directory: Path, fields: Mapping[str, Any]) -> ConfigDict:
    try:
        return config_lib.recorded(fields)
    except UserError as error:
        path = directory / "config.json"
        raise UserError(f"{path} was damaged or is from another version: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    files.write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
      UserError: it is missing or damaged, no regular file, or larger than `MOST_JSON`.
    """
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or name another directory") from error


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
      OSError: it is missing or may not be read.
      ValueError: it is no regular file (a pipe would be waited for), larger than `MOST_JSON`, or no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"it is larger than {MOST_JSON:,} bytes")
    return content.decode("utf-8-sig")  # editors may begin a file with a byte-order mark


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a clone that was not installed


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
