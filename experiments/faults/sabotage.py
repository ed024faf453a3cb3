"""One run under attack: where it lies, how its command is started and disturbed, and what must hold whatever was done.

Everything here is seen from outside, as a user or an operator sees a run: processes, files, exit statuses. What is
broken and what is checked, `experiments/faults/__main__.py` tells.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_flax.data import prepare
from mnist_flax.runtime import cli, run_dir

# So small that a process takes seconds, most of them imports; with dropout, whose random state resuming must get right.
EPOCHS = 12
FIELDS = {
    "model.channels": "(4,)",
    "model.dense": "(4,)",
    "model.dropout_rate": 0.1,
    "model.compute_dtype": "float32",
    "augment.rotation": 0.0,
    "augment.shift": 0.0,
    "augment.zoom": 0.0,
    "augment.shear": 0.0,
    "train_examples": 256,
    "validation_examples": 100,
    "num_epochs": EPOCHS,
}
PATIENCE = 900  # seconds after which a process counts as hung, on a machine that may have much other work
# Of each phase: seconds of a process's own CPU time from its beginning within which it is disturbed, and how often it
# is chosen beside the others. The last ones are rarer: few trials fit into a run that comes so far.
PHASES = {
    "imports": (1.0, 2),
    "preparation": (1.0, 2),
    "compilation": (0.7, 2),
    "a step": (1.0, 3),
    "a save": (0.06, 3),
    "the last save": (0.06, 1),
    "the report": (1.5, 1),
    "the summary": (0.01, 1),
}
_FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketimeMT.so.1"


class Ended(NamedTuple):
    """How a process ended."""

    status: int  # minus the signal that killed it
    out: str
    err: str


class Process:
    """A training command that was started; its output goes to files."""

    def __init__(self, command: list[str], environment: dict[str, str], logs: Path):
        self.out_path, self.err_path = logs.with_suffix(".out"), logs.with_suffix(".err")
        self.started = time.time_ns()
        with self.out_path.open("w") as out, self.err_path.open("w") as err:
            self.popen = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether `condition` came true before the process ended.

        Raises:
          TimeoutError: neither happened.
        """
        deadline = time.monotonic() + PATIENCE
        while self.popen.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                self.popen.kill()
                self.popen.wait()
                raise TimeoutError("the process hung")
            time.sleep(0.003)
        return False

    def work(self, seconds: float) -> None:
        """Waits while the process works for so long; its own CPU time counts, so other load does not matter."""
        since = self._cpu_seconds()
        self.wait_until(lambda: self._cpu_seconds() >= since + seconds)

    def _cpu_seconds(self) -> float:
        try:
            return time.clock_gettime(~self.popen.pid << 3 | 2)  # what clock_getcpuclockid(3) gives
        except OSError:  # it has ended
            return math.inf

    def send(self, *numbers: int, within: float = 0.0, chance: random.Random | None = None) -> None:
        """Sends signals, one after another."""
        for number in numbers:
            self.popen.send_signal(number)
            if chance:
                self.work(chance.uniform(0, within))

    def end(self) -> Ended:
        self.wait_until(lambda: False)
        return Ended(self.popen.returncode, self.out(), self.err_path.read_text(errors="replace"))


class Site:
    """Directories of one run: its workdir and its data_dir, both on disks that can be filled where `disks` is true."""

    def __init__(self, root: Path, cache: Path, *, data_dir: Path | None, disks: bool):
        self.root, self.cache, self.disks = root, cache, disks
        self.mounts = {name: root / name for name in ("disk", "data_disk")}
        for mount in self.mounts.values():
            mount.mkdir(parents=True)
            if disks:
                _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount))
        self.workdir = self.mounts["disk"] / "run"
        self.data_dir = data_dir or self.mounts["data_disk"] / "data"
        self.own_data = data_dir is None
        self.processes = 0
        self.newest = 0  # step of the newest checkpoint that may not get lost
        self.damaged = False  # whether one was damaged on purpose

    def close(self, *, keep: bool) -> None:
        """Unmounts; removes everything unless it is to be `keep`t."""
        for mount in self.mounts.values():
            if self.disks:
                if keep:
                    shutil.copytree(mount, self.root / f"{mount.name}.copy", dirs_exist_ok=True)
                subprocess.run(["umount", "--lazy", str(mount)], check=True)
        if not keep:
            shutil.rmtree(self.root)

    def start(self, **variables: str) -> Process:
        self.processes += 1
        fields = {**FIELDS, "data_dir": self.data_dir}
        overrides = [f"--config.{key}={value}" for key, value in fields.items()]
        arguments = ["--config=configs/digits.py", *overrides, f"--workdir={self.workdir}"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(self.cache), **variables}
        command = [sys.executable, "-m", "mnist_flax.main", *arguments]
        return Process(command, environment, self.root / f"process{self.processes}")

    def faked_clock(self, offset: str) -> tuple[dict[str, str], Path]:
        """Environment of a process whose clock is `offset` seconds off, and the file that changes it as it runs."""
        file = self.root / "clock"
        file.write_text(offset)
        variables = {
            "LD_PRELOAD": str(_FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # what jumps is the time of day
        }
        return variables, file

    def remount(self, disk: str, options: str) -> None:
        _mount("-o", f"remount,{options}", str(self.mounts[disk]))

    def reached(self, phase: str, process: Process) -> bool:
        """Whether a process has come to a phase (or past it)."""

        def fresh(path: Path) -> bool:
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_mtime_ns > process.started
            return False

        match phase:
            case "imports":
                return True
            case "preparation":
                return any(self.data_dir.glob(".mnist_flax/*.incomplete*"))
            case "compilation":
                return "Parameters" in process.out()
            case "a step":
                return "compiled in" in process.out()
            case "a save":
                return any(map(fresh, self._unfinished()))
            case "the last save":
                return f"epoch {EPOCHS:3d}/" in process.out() and any(map(fresh, self._unfinished()))
            case "the report":
                return fresh(self.workdir / "evaluation_test.json")
            case "the summary":
                return fresh(self.workdir / "report.html")
        raise ValueError(phase)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were saved."""
        return sorted(int(path.name) for path in self._checkpoints() if path.name.isdigit())

    def finished(self) -> bool:
        return (self.workdir / "summary.json").exists()

    def _checkpoints(self) -> list[Path]:
        directory = self.workdir / run_dir.CHECKPOINTS
        return list(directory.iterdir()) if directory.exists() else []

    def _unfinished(self) -> list[Path]:
        return [path for path in self._checkpoints() if not path.name.isdigit()]

    def damage_checkpoint(self, chance: random.Random) -> str:
        """Harms a random file of the newest checkpoint; says what was done."""
        *_, before, newest = self.steps()
        directory = self.workdir / run_dir.CHECKPOINTS / str(newest)
        file = chance.choice(sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size))
        harm = chance.choice(("cut", "flipped", "deleted"))
        content = bytearray(file.read_bytes())
        if harm == "deleted":
            file.unlink()
        elif harm == "cut":
            file.write_bytes(content[: chance.randrange(len(content))])
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        self.newest, self.damaged = before, True
        return harm

    def cut_metrics(self, chance: random.Random) -> None:
        path = self.workdir / "metrics.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[: chance.randrange(len(content))])

    def fill(self, left: int) -> None:
        """Fills the workdir's disk but for `left` bytes."""
        with (self.mounts["disk"] / "ballast").open("wb") as ballast:
            for _ in range(100):  # the process may be writing too
                stat = os.statvfs(self.mounts["disk"])
                missing = stat.f_bavail * stat.f_frsize - left
                if missing <= 0:
                    return
                with contextlib.suppress(OSError):
                    os.posix_fallocate(ballast.fileno(), os.fstat(ballast.fileno()).st_size, missing)

    def empty(self) -> None:
        (self.mounts["disk"] / "ballast").unlink(missing_ok=True)

    def violations(self, ended: Ended, allowed: Iterable[int]) -> list[str]:
        """What a process left behind that it should not have."""
        found = []
        if ended.status not in allowed:
            found.append(f"status {ended.status}")
        if "Traceback" in ended.err or "Exception ignored" in ended.err:
            found.append("a traceback")
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if len(errors) != (ended.status in (1, 2)):
            found.append(f"{len(errors)} lines of error at status {ended.status}")
        resumes = "stopped; this command goes on from here" in ended.out
        if ended.status == 0 and not (self.finished() or resumes):
            found.append("ended well with neither a summary nor the command that resumes")
        steps = self.steps()
        if max(steps, default=0) < self.newest:
            found.append(f"checkpoint {self.newest} was lost: there are {steps}")
        if "is damaged" in ended.err and not self.damaged:
            found.append("a checkpoint was damaged")
        self.newest = max([self.newest, *steps])
        records, cut = _read_records(self.workdir / "metrics.jsonl")
        places = [(record["epoch"], record["split"]) for record in records]
        due = [(epoch, split) for epoch in range(1, EPOCHS + 1) for split in ("train", "validation")]
        if places != due[: len(places)]:
            found.append(f"metrics.jsonl has {places}")
        unsaved = cut or (records and records[-1]["step"] > max(steps, default=0))
        if resumes and "compiled in" in ended.out and unsaved:
            found.append("stopped before all that was recorded was saved")
        place = self.data_dir / "digits" / prepare.VERSIONS["digits"]
        if place.exists():
            try:
                prepare.check_shards(place)
            except cli.UserError as error:
                found.append(f"half-prepared data: {error}")
        return found

    def differences(self, reference: dict[str, Any]) -> list[str]:
        """How the finished run differs from one that nothing disturbed."""
        if not self.finished():
            return ["no summary"]
        found = [key for key, value in results(self.workdir).items() if value != reference[key]]
        left = [path.name for path in self.workdir.rglob("*") if "tmp" in path.name]
        left += [path.name for path in self.data_dir.glob(".mnist_flax/*incomplete*")]
        return [f"another {key}" for key in found] + [f"left behind {name}" for name in left]


def results(workdir: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on what happened to it."""
    import jax
    from orbax.checkpoint import v1 as ocp

    newest = max(int(path.name) for path in (workdir / run_dir.CHECKPOINTS).iterdir() if path.name.isdigit())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax reads how the arrays were sharded from a file, and says so
        state = ocp.load(workdir / run_dir.CHECKPOINTS / str(newest))
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        digest.update(jax.tree_util.keystr(key).encode() + np.asarray(leaf).tobytes())
    timed = ("seconds", "images_per_second")
    records, _ = _read_records(workdir / "metrics.jsonl")
    summary = run_dir.read_json(workdir / "summary.json")
    curves, end = read_events(events_file(workdir))
    return {
        "state": digest.hexdigest(),
        "metrics": [{key: value for key, value in record.items() if key not in timed} for record in records],
        "summary": {key: value for key, value in summary.items() if not key.endswith(("seconds", "second"))},
        "curves in TensorBoard": {tag: [step for step, _ in points] for tag, points in curves.items()},
        "end of the TensorBoard file": end == events_file(workdir).stat().st_size,
    }


def _read_records(path: Path) -> tuple[list[dict], bool]:
    """The whole lines of metrics.jsonl, and whether another was cut."""
    *lines, rest = (path.read_text() if path.exists() else "").split("\n")
    return [json.loads(line) for line in lines], bool(rest)


Curves = dict[str, list[tuple[int, float]]]  # points (step, value) by tag


def read_events(path: Path, start: int = 0) -> tuple[Curves, int]:
    """The scalars in a TensorBoard file from byte `start` on, and where its last whole record ends.

    Raises:
      ValueError: a record's checksum is wrong.
    """
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    curves: Curves = {}
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    place = 0
    while len(content) >= place + 16:  # length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", content, place)
        if len(content) < place + 16 + length:
            break
        body = content[place + 12 : place + 12 + length]
        if struct.unpack_from("<I", content, place + 12 + length) != (masked_crc32c(body),):
            raise ValueError(f"{path} is damaged at byte {start + place}")
        event = event_pb2.Event.FromString(body)
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
        place += 16 + length
    return curves, start + place


def events_file(workdir: Path) -> Path:
    """The one TensorBoard file of a run.

    Raises:
      ValueError: there is none, or there are several.
    """
    (path,) = (workdir / run_dir.TENSORBOARD).glob("events.out.tfevents.*")
    return path


def can_mount(directory: Path) -> bool:
    """Whether this process may mount a small file system."""
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        return False
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
    return True


def can_fake_clock() -> bool:
    return _FAKETIME.exists()


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


SIGNALS = {
    "SIGKILL": ((signal.SIGKILL,), {-9}),
    "SIGTERM": ((signal.SIGTERM,), {0}),
    "SIGINT": ((signal.SIGINT,), {0}),
    "SIGTERM twice": ((signal.SIGTERM, signal.SIGTERM), {0, -15}),
    "SIGINT twice": ((signal.SIGINT, signal.SIGINT), {0, -2}),
}
