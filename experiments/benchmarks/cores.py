"""The CPU cores that this process may use, and processes that use some of them."""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator

import numpy as np

CAN_BIND = hasattr(os, "sched_setaffinity")  # macOS binds no process to cores


def usable() -> set[int]:
    """The numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if CAN_BIND else set(range(os.cpu_count() or 1))


@contextlib.contextmanager
def bound(cores: set[int]) -> Iterator[None]:
    """Keeps this process, and those that it starts here, to these cores, where the system can."""
    if not CAN_BIND:
        yield
        return
    everywhere = usable()
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def exchange_seconds() -> float | None:
    """Median time to copy 256 kB that another core has just written; None where there is no other to bind to.

    A virtual machine's cores may be moved to other places while it runs: beside each other they share a cache, and on
    two chiplets or sockets they do not, which slows programs whose threads work on each other's results.
    """
    here, *others = sorted(usable())
    if not (CAN_BIND and others):
        return None
    written, copy = (np.zeros(2**16, np.float32) for _ in range(2))
    times = []
    for trial in range(100):
        with bound({others[0]}):
            written.fill(trial)
        with bound({here}):
            copy.fill(trial)
            started = time.perf_counter()
            np.copyto(copy, written)
            times.append(time.perf_counter() - started)
    return statistics.median(times)
