"""Runs commands, each in a fork of one process that has imported the libraries: importing them costs seconds each time.

Nothing of this project is imported before the fork. Each line of the input is a request, each of the output the status.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

LIBRARIES = (
    *("absl.app", "flax.linen", "grain", "jax.numpy", "matplotlib.backends.backend_agg", "ml_collections", "optax"),
    *("orbax.checkpoint", "PIL.Image", "rich.progress", "scipy.stats", "sklearn.datasets", "tensorboardX"),
)
SECONDS = 600  # which no command may exceed, however busy the machine


def become(module: str, arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Makes this process what `python -m module` would be before it runs its module."""
    signal.alarm(SECONDS)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate((os.devnull, *outputs)):
        file = os.open(name, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = cwd
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]


def main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; the end of the input ends this
    gc.freeze()  # so that forks share the memory
    for line in sys.stdin:
        request = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            become(**request)
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
            return


if __name__ == "__main__":
    main()
