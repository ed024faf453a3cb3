"""Running the project's commands as a user would, in a process of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).resolve().parent.parent

# Tests in the background of a script ignore SIGINT, and what they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
    flags = os.environ["XLA_FLAGS"]  # see conftest.py
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    return variables | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def start(
    module: str, *arguments: object, devices: int = 1, cwd: Path = ROOT, option: str = "-m", **variables: str
) -> subprocess.Popen:
    command = [sys.executable, option, module, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(devices, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def finish(process: subprocess.Popen, status: int | None = 0) -> subprocess.CompletedProcess:
    """Waits for a command, and checks that it ended with `status` and showed no traceback."""
    out, err = process.communicate(timeout=300)
    return check(subprocess.CompletedProcess(process.args, process.returncode, out, err), status)


def check(ended: subprocess.CompletedProcess, status: int | None) -> subprocess.CompletedProcess:
    assert "Traceback" not in ended.stderr, ended.stderr
    assert status is None or ended.returncode == status, f"status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended


@cache
def fork_server() -> subprocess.Popen:
    """The process of `tests.fork_server`, one a test process; it ends when this one does."""
    program = [sys.executable, "-m", "tests.fork_server"]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True)


def command(module: str, *arguments: object, status: int | None = 0, devices: int = 1, cwd: Path = ROOT):
    """Runs a command to its end, as `finish(start(...))` does, but sooner: see `tests.fork_server`."""
    with tempfile.NamedTemporaryFile("r+") as out, tempfile.NamedTemporaryFile("r+") as err:
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environment": environment(devices),
            "outputs": [out.name, err.name],
        }
        server = fork_server()
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        ended = subprocess.CompletedProcess(["-m", module, *request["arguments"]], code, out.read(), err.read())
    return check(ended, status)


def refusal(module: str, *arguments: object, **variables: str) -> str:
    """The one line in which a command refuses what it is given."""
    # Variables may be of libraries that read them while they are imported.
    ended = finish(start(module, *arguments, **variables), 2) if variables else command(module, *arguments, status=2)
    error = ended.stderr
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Waits until `condition()` or until the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def kill_while(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Kills a process while `condition()` holds: it is stopped first, since what holds now may not a moment later."""

    def caught() -> bool:
        if not condition():
            return False
        process.send_signal(signal.SIGSTOP)
        if condition():
            return True
        process.send_signal(signal.SIGCONT)
        return False

    wait_for(caught, process, seconds)
    process.kill()
    finish(process, None)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(workdir: Path) -> list[tuple[str, bytes]]:
    """Everything that training carries, bit for bit, from the last checkpoint."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    state = ocp.load(workdir / "checkpoints" / str(max(steps)))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]
