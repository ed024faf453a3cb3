"""The CPU cores that this process may use, and processes that use some of them."""

import contextlib
import os
from collections.abc import Iterator

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
