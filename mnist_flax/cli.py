"""What every command shares: how a user's mistake is reported, and which status a command ends with."""

import contextlib
import errno
import logging as std_logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

STARTED = time.perf_counter()  # every command imports this module first: about when its process began
# Failures of storage, which can come up wherever a file is written: one line says all there is to say.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES}
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# While one of our commands still imports what it needs, Ctrl-C ends it at once; a traceback would tell nothing.
_main = getattr(sys.modules.get("__main__"), "__spec__", None)
_IMPORTING = (
    _main is not None
    and _main.parent in ("mnist_flax", "experiments")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _IMPORTING:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class UserError(ValueError):
    """Something the user can put right: its message is one line that says what is wrong and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on through no mistake in the command: one line that says why, and what to do."""


class Stop:
    """Whether SIGTERM or SIGINT came. The first asks training to stop after the step; a second ends the process.

    Until there is something to save (`can_wait`), the first ends the process too: with `farewell` printed and status 0
    if there is one, else by KeyboardInterrupt.
    """

    def __init__(self, farewell: str = "") -> None:
        self.requested = False
        self.can_wait = False
        self._farewell = farewell
        for number in _STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        for either in _STOP_SIGNALS:
            signal.signal(either, signal.SIG_DFL)
        self.requested = True
        if self.can_wait:
            return
        if not self._farewell:
            raise KeyboardInterrupt
        # An exception would come up anywhere in the imports, and some of them make an ImportError of it.
        # `sys.stdout` may be another just now, while data are prepared.
        if sys.__stdout__:
            with contextlib.suppress(OSError):
                os.write(sys.__stdout__.fileno(), f"{self._farewell}\n".encode())
        os._exit(0)

    def __call__(self) -> bool:
        return self.requested


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags; any complaint becomes a UserError (absl's own exit status would be 1)."""
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = str(error.args[0] if error.args else error)
        raise UserError(" ".join(message.split())) from error


def _is_worth_showing(record: std_logging.LogRecord) -> bool:
    """Our own log lines and others' warnings; Orbax logs failures that reach us as exceptions too."""
    ours = Path(record.pathname).is_relative_to(Path(__file__).parent)
    return ours or (record.levelno >= std_logging.WARNING and "orbax" not in record.pathname)


def _exit_on_user_error(function: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        return function(argv) or 0
    except UserError as error:
        logging.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _STORAGE_ERRORS:
            raise
        logging.flush()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells report a command that Ctrl-C ended


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Runs `main(argv)` as a command and ends the process.

    Exit status: what `main` returns (None is 0), 2 with one line on standard error after a `UserError`, 1 with one line
    after a `RunError` and with a traceback after anything else, 130 after Ctrl-C where `main` does not handle it.
    """

    if _IMPORTING:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_worth_showing)

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            return _parse_flags(arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(
        lambda arguments: sys.exit(_exit_on_user_error(main, arguments)),
        argv=list(argv) if argv is not None else None,
        flags_parser=parse,
    )
