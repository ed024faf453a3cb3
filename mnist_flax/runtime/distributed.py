"""Training by several processes, on one host or many, as `jax.distributed` joins them.

Each process drives its own devices and runs the same program; JAX does what the processes do together. Here is how a
process joins, what only the first one does (whatever is printed or written, checkpoints apart, which all of them save),
how they agree to stop, and how a job goes down: when a process fails or is lost, the others end too, within seconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from mnist_flax.runtime import cli, terminal

_JOIN_SECONDS = 300  # a cluster may start its processes minutes apart
_LAST_WORDS_SECONDS = 2.0  # for which the first process stays, so that others who fail as it did can say so themselves

# XLA ends a process whose job is lost from within, with a stack trace. This stands between its output and the user's.
_FATAL = "JAX distributed service detected fatal errors"
_CONDENSE = """
import sys
fatal, late, lost = sys.argv[1:]
for line in sys.stdin.buffer:
    if fatal.encode() in line:
        sys.stderr.write("error: " + (late if b"DEADLINE_EXCEEDED" in line else lost) + "\\n")
        break
    sys.stderr.buffer.write(line)
    sys.stderr.flush()
for line in sys.stdin.buffer:
    pass
"""
_LATE = (
    f"not all processes of this job came within {_JOIN_SECONDS} s: start them all, with the same coordinator address"
)
_LOST = (
    "another process of this job ended, or can no longer be reached: see what it printed, then start all of them again"
)


def define_flags() -> None:
    """Defines the flags by which a process finds its job."""
    flags.DEFINE_bool("distributed", False, "join the job that the cluster's environment describes, as JAX detects it.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, which the others connect to.")
    flags.DEFINE_integer("num_processes", None, "processes of the job.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_seconds", 20, "after so long without a sign of life a process is given up.", lower_bound=5
    )


@contextlib.contextmanager
def job(workdir: str | None) -> Iterator[bool]:
    """Joins the job that the flags describe, if they describe one; an error inside takes the whole job down.

    Yields:
      Whether this process is the first one, which prints and writes.

    Raises:
      UserError: flags that do not fit together, or no cluster where `--distributed` says that there is one.
    """
    if not _join(workdir):
        yield True
        return
    try:
        yield is_first()
    except BaseException as error:
        _leave(error)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    import jax

    return jax.process_index() == 0


def _join(workdir: str | None) -> bool:
    address, count, number = flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id
    given = [value is not None for value in (address, count, number)]
    if not any(given) and not flags.FLAGS.distributed:
        return False
    if not all(given) and not flags.FLAGS.distributed:
        raise cli.UserError(
            "--coordinator_address, --num_processes and --process_id go together: give all three, "
            "or --distributed where Slurm, Open MPI, Kubernetes or a TPU pod tells them"
        )
    if count is not None and number is not None and number >= count:
        raise cli.UserError(f"--process_id={number} does not fit: {count} processes are numbered from 0 to {count - 1}")
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise cli.UserError(f"--coordinator_address={address} has no port: give HOST:PORT")
    if workdir is None and count != 1:
        raise cli.UserError(
            f"several processes need one run directory: name {cli.option('workdir', 'DIR')} that all of them share"
        )

    # What XLA logs of a job that is lost says no more than the line that it ends with. 1 is what JAX sets itself.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    _condense_fatal_errors()
    import jax

    # Its handler would take SIGTERM from ours; `StopConsensus` has all processes stop at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own could not act while the call below waits
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=flags.FLAGS.heartbeat_seconds,
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise cli.UserError(
            f"cannot join a job ({cli.reason(error)}): "
            "give --coordinator_address=HOST:PORT, --num_processes and --process_id"
        ) from error
    finally:
        signal.signal(signal.SIGINT, handler)
    terminal.console.quiet = not is_first()
    return jax.process_count() > 1


def _condense_fatal_errors() -> None:
    """Sends standard error through a process that makes one line of XLA's last words; Python's own goes as before."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    command = [sys.executable, "-I", "-S", "-c", _CONDENSE, _FATAL, _LATE, _LOST]
    condenser = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert condenser.stdin
    os.dup2(condenser.stdin.fileno(), 2)
    condenser.stdin.close()
    condenser.returncode = 0  # it ends when all writers have: nobody waits for it


def _leave(error: BaseException) -> None:
    """Says why, and ends this process at once: JAX would first wait for the others, who may be waiting for it."""
    status = cli.report(error)
    if status is None and _is_loss(error):
        os.write(2, f"{_FATAL}\n".encode())  # XLA may be about to say so too
        status = 1
    elif status is None:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(_LAST_WORDS_SECONDS)  # with it ends the service that the others live by
    os._exit(status)


def _is_loss(error: BaseException) -> bool:
    """Whether what failed is communication between processes."""
    return any(word in str(error) for word in ("Gloo", "NCCL", "coordination", "UNAVAILABLE", "remote task"))


class StopConsensus:
    """What all processes do next: each says what it would, and all get the same answer, a call later.

    By then the vote is counted, so nobody waits. A process alone has its way at once.
    """

    def __init__(self, mesh: Any):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding

        from mnist_flax.runtime.devices import BATCH_AXIS, REPLICATED

        self._ballot = NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXIS))
        self._count = jax.jit(lambda votes: jnp.max(votes, 0), out_shardings=NamedSharding(mesh, REPLICATED))
        self._last: Any = None

    def __call__(self, stop: bool, steps: int) -> tuple[bool, int]:
        """Whether anyone wants to `stop`, and the smallest number of `steps` that anyone would take at once."""
        import jax
        import numpy as np

        if jax.process_count() == 1:
            return stop, steps
        votes = np.tile(np.array([stop, -steps], np.int32), (jax.local_device_count(), 1))
        counted, self._last = self._last, self._count(jax.make_array_from_process_local_data(self._ballot, votes))
        if counted is None:
            return False, steps
        stop, steps = np.asarray(counted)
        return bool(stop), -int(steps)
