"""Jobs of several processes over loopback, where CPUs exchange by gloo."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

from mnist_flax.runtime import devices, run_dir
from mnist_flax.training import checkpoint
from mnist_flax.training.state import TrainState, abstract_state
from tests.commands import command, finish, records, refusal, start, wait_for
from tests.trained import once

SMALL = (
    "--config=configs/digits.py",
    "--config.train_examples=330",
    "--config.batch_size=32",
    "--config.num_epochs=12",
    "--config.model.channels=(4,)",
    "--config.model.pool_sizes=(4,)",
    "--config.model.dense=(8,)",
    "--config.model.batch_norm=True",
    "--config.model.compute_dtype=float32",
    "--config.optimizer.learning_rate=0.01",
    "--config.augment.strokes=1.0",
    *(f"--config.augment.{name}=0.0" for name in ("rotation", "shift", "zoom", "shear")),
    "--heartbeat_seconds=30",
)


@pytest.fixture(scope="module")
def small(digits_data_dir):
    return (*SMALL, f"--config.data_dir={digits_data_dir}")


@pytest.fixture(scope="module")
def alone(small, digits_data_dir):
    """A run by one process."""
    workdir = digits_data_dir.with_name("alone")
    return once(workdir, "summary.json", lambda: command("mnist_flax.main", *small, f"--workdir={workdir}"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_job(processes: int, *arguments: object) -> list[subprocess.Popen]:
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    count = f"--num_processes={processes}"
    return [start("mnist_flax.main", *arguments, address, count, f"--process_id={i}") for i in range(processes)]


def start_slurm_job(processes: int, *arguments: object) -> list[subprocess.Popen]:
    """The same, found by JAX in the variables that Slurm sets."""
    common = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes)}
    common["JAX_COORDINATOR_PORT"] = str(free_port())
    return [
        start("mnist_flax.main", *arguments, "--distributed", **common, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i in range(processes)
    ]


def wait_for_epoch(epoch: int, workdir: Path, process: subprocess.Popen) -> None:
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and f'"epoch": {epoch}' in metrics.read_text(), process)


def goes_down(processes: Iterable[subprocess.Popen], seconds: float = 60) -> None:
    """Checks that the processes end by themselves, none with success and each with one line."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.wait(max(deadline - time.monotonic(), 0.1))
        ended = finish(process, None)
        assert ended.returncode != 0
        assert ended.stderr.startswith("error: another process of this job ended")
        assert len(ended.stderr.splitlines()) == 1, ended.stderr


def last_state(workdir: Path) -> TrainState:
    abstract = abstract_state(run_dir.read_config(workdir), 10, devices.make_mesh())
    return checkpoint.load(workdir / "checkpoints", "last", abstract)[0]


def alike(workdir: Path, other: Path) -> None:
    for mine, theirs in zip(records(workdir), records(other), strict=True):
        assert (mine["step"], mine["split"]) == (theirs["step"], theirs["split"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), mine
    mine, theirs = (json.loads((path / "summary.json").read_text()) for path in (workdir, other))
    assert mine["steps"] == theirs["steps"] and abs(mine["test_errors"] - theirs["test_errors"]) <= 1


@pytest.fixture(scope="module")
def two(small, digits_data_dir):
    """A run by two processes in a Slurm job; beside it printed.json, what they printed."""
    directory = digits_data_dir.with_name("two")

    def make():
        job = start_slurm_job(2, *small, "--config.feed=stream", f"--workdir={directory / 'run'}")
        ended = [finish(process) for process in job]
        (directory / "printed.json").write_text(json.dumps([(end.stdout, end.stderr) for end in ended]))

    return once(directory, "printed.json", make) / "run"


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_the_first_one_tells(two, alone):
    alike(two, alone)
    first, second = json.loads((two.parent / "printed.json").read_text())
    assert first[0].splitlines()[0] == str(two) and "test_accuracy" in first[0]
    assert [line for line in second[0].splitlines() if not line.startswith("[Gloo]")] == []
    assert first[1] == second[1] == ""
    device = json.loads((two / "config.json").read_text())["device"]
    assert (device["count"], device["processes"]) == (2, 2)
    assert len(list((two / "tb").iterdir())) == 1


@pytest.mark.slow
def test_stopped_and_killed_and_started_again_ends_bit_for_bit_the_same(two, small, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*small, "--config.feed=stream", f"--workdir={workdir}")
    job = start_job(2, *arguments)
    wait_for_epoch(1, workdir, job[0])
    job[1].send_signal(signal.SIGTERM)  # one is asked to stop: both do, after the same step
    outs = [finish(process, 0).stdout for process in job]
    assert "this command goes on from here" in outs[0] and "--process_id=0" in outs[0]
    assert not (workdir / "summary.json").exists()

    before = records(workdir)[-1]["epoch"]
    job = start_job(2, *arguments)
    wait_for_epoch(before + 1, workdir, job[0])
    job[1].kill()
    finish(job[1], None)
    goes_down(job[:1])

    for process in start_job(2, *arguments):
        finish(process)
    jax.tree.map(np.testing.assert_array_equal, last_state(workdir), last_state(two))


@pytest.mark.slow
def test_four_processes_go_down_with_the_first_and_one_finishes_their_work(alone, small, tmp_path):
    workdir = tmp_path / "run"
    job = start_job(4, *small, f"--workdir={workdir}")
    wait_for_epoch(1, workdir, job[0])
    job[0].kill()
    finish(job[0], None)
    goes_down(job[1:])
    command("mnist_flax.main", *small, f"--workdir={workdir}")
    alike(workdir, alone)


@pytest.mark.slow
def test_a_mistake_of_all_is_told_by_each_in_one_line(small, two):
    job = start_job(2, *small, "--config.seed=1", f"--workdir={two}")
    for process in job:
        ended = finish(process, 2)
        assert len(ended.stderr.splitlines()) == 1 and "seed: 0 -> 1" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--num_processes=2"], "go together"),
        (["--coordinator_address=host:1", "--num_processes=2", "--process_id=2"], "numbered from 0 to 1"),
        (["--coordinator_address=host", "--num_processes=2", "--process_id=1"], "HOST:PORT"),
        (["--coordinator_address=host:1", "--num_processes=2", "--process_id=1"], "--workdir"),
        (["--distributed", "--workdir=runs/none"], "cannot join a job"),
    ],
)
def test_flags_that_do_not_describe_a_job_are_refused(flags, hint):
    assert hint in refusal("mnist_flax.main", "--config=configs/digits.py", *flags)
