"""What every command shares: how a user's mistake is reported, and which status a command ends with."""

import contextlib
import errno
import gc
import io
import logging as std_logging
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from absl import app, flags, logging

STARTED = time.perf_counter()  # every command imports this module first: about when its process began
# Failures of storage, which can come up wherever a file is written: one line says all there is to say.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
_PERMISSION_ERRORS = {errno.EACCES, errno.EROFS}
# Of a path that no file can have, or that is a directory where a file is wanted, or the other way round.
_NAME_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ADDRESSES = {"storage", "worker", "coordinator_address", "host"}  # flags that name no file or directory


# How absl, ml_collections and Python say that the text of a flag is not of its type, and what that means.
_IN_PLAIN_WORDS = {
    "invalid literal for int()": "must be a whole number",
    "could not convert string to float": "must be a number, such as 0.001",
    "('Non-boolean argument": "must be true or false",
    "Error while parsing string": "must be numbers in parentheses, such as (3,) or (3,5)",
    "value should be one of ": "must be one of ",
}


class UserError(ValueError):
    """Something the user can put right: its message is one line that says what is wrong and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on through no mistake in the command: one line that says why, and what to do."""


class Stop:
    """Whether SIGTERM or SIGINT came. The first asks training to stop after the step; a second ends the process.

    Until there is something to save (`can_wait`, from the first time that it is asked), the first ends the process
    too: with `farewell` printed and status 0 if there is one, else by KeyboardInterrupt.
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
        self.can_wait = True
        return self.requested


def reason(error: BaseException) -> str:
    """What an exception says, on one line of at most 500 characters; its name if it says nothing."""
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one in another
        error = error.args[0]
    # A KeyError shows its text as Python would write it, with quotes and escapes.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(text.split())[:500] or type(error).__name__


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
    """Turns whatever absl and ml_collections raise over a flag into a UserError (absl's own exit status would be 1)."""
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        raise UserError(_meant(error.flagname) or reason(error)) from error
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        raise UserError(_in_plain_words(reason(error))) from error
    except (SyntaxError, RecursionError, MemoryError) as error:  # of a value that Python's parser gives up on
        raise UserError(f"a value on the command line is no Python literal ({type(error).__name__})") from error


def _in_plain_words(text: str) -> str:
    for said, meant in _IN_PLAIN_WORDS.items():
        flag, found, rest = text.partition(f": {said}")
        if found:
            choices = rest.strip("<>").replace("|", ", ") if meant.endswith(" ") else ""
            return f"{flag.removeprefix('flag ')} {meant}{choices}"
    return text


def _meant(name: str) -> str | None:
    """What to say where the name of an unknown flag is that of a config's field."""
    from mnist_flax.runtime.config import find_field

    field = find_field(name) if "config" in flags.FLAGS else None
    return field and f"--{name} is not a flag of this command: did you mean --config.{field}=?"


def check_path(named: str, path: str | Path) -> None:
    """Refuses a URL where a path is wanted: locks, `fsync` and renames need a file system; `named` begins the message.

    Raises:
      UserError: the path has the form `scheme://`. (A Path made of it has lost a slash, and is a relative name.)
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", str(path), re.IGNORECASE):
        local = unquote(urlsplit(str(path)).path)
        way = f"write {local}" if str(path).lower().startswith("file:///") else "name one in a file system"
        raise UserError(f"{named} is a URL, not a path: {way}")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    with flag_errors():
        arguments = flags.FLAGS(list(argv))
    for name in (name for name in flags.FLAGS if "." not in name):  # fields of a config have checks of their own
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):  # NaN is below no bound and above none
            raise UserError(f"--{name}={value} is no finite number: use one")
        if value in ("", []) and flags.FLAGS[name].present:
            raise UserError(f"--{name}= names nothing: give a value, or leave the flag out")
        if isinstance(value, str) and value.startswith("--"):  # of `--workdir --train_only`
            raise UserError(f"--{name} is followed by {value}: give it a value")
        if isinstance(value, str) and value.startswith("~"):  # a path, which shells leave as it is after `=`
            flags.FLAGS[name].value = os.path.expanduser(value)
        if isinstance(value, str) and name not in _ADDRESSES:
            check_path(f"--{name}={value}", value)
    if "" in arguments:  # as a path it would be the current directory
        raise UserError("an argument is empty (a shell variable that is not set?): give a value, or leave it out")
    for argument in arguments[1:]:
        check_path(argument, argument)
    return arguments


def option(name: str, value: str) -> str:
    """How this command, or a call in Python, is told `value`: an error names no flag that the command does not have."""
    return f"--{name}={value}" if name.partition(".")[0] in flags.FLAGS else f"{name}={value}"


def one_line(text: str) -> str:
    """The text with line breaks, and all else that cannot be printed, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_error(message: object) -> None:
    """Prints one line on standard error, whatever names of files and contents the message quotes."""
    print(f"error: {one_line(str(message))}", file=sys.stderr, flush=True)


class _LogFormatter(std_logging.Formatter):
    """A log line for users, as `print_error` writes: no time, thread or place in the code."""

    def format(self, record: std_logging.LogRecord) -> str:
        kind = "note" if record.levelno < std_logging.WARNING else record.levelname.lower()
        return f"{kind}: {super().format(record)}"


def _is_worth_showing(record: std_logging.LogRecord) -> bool:
    """Our own log lines and others' warnings; Orbax and Pillow log failures that reach us as exceptions too."""
    ours = Path(record.pathname).is_relative_to(Path(__file__).parents[1])
    raises = any(name in record.pathname for name in ("orbax", "/PIL/"))
    # Of the arrays of a damaged checkpoint, all but the first that could not be read.
    raises |= record.name == "asyncio" and "tensorstore" in record.getMessage()
    return ours or (record.levelno >= std_logging.WARNING and not raises)


def _silence_closed_loops() -> None:
    """When one write or read fails, TensorStore tells of the others to an event loop that Orbax has closed by then.

    Each would be a traceback on standard error, beside the exception of the first, which is the one that matters.
    """
    shown = sys.unraisablehook

    def hook(unraisable) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


def _raised_in(error: BaseException) -> str:
    """The file whose code raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def report(error: BaseException) -> int | None:
    """Says in one line what went wrong; gives the exit status. None, and nothing said: this needs a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 130  # as shells report a command that Ctrl-C ended
    if isinstance(error, ValueError) and _raised_in(error).endswith("/jax/_src/config.py"):  # by a JAX_... variable
        error = UserError(f"{reason(error)}: correct or unset that variable")
    if isinstance(error, BrokenPipeError):  # who reads what is printed has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or flushing at the end would say so at length
        return 141  # as shells report a command that SIGPIPE ended
    if not isinstance(error, UserError | RunError | OSError):
        return None
    if isinstance(error, OSError):
        if error.errno in _NAME_ERRORS:
            error = UserError(f"{error.filename} cannot be used ({error.strerror}): choose another name")
        elif error.errno in _PERMISSION_ERRORS:
            error = UserError(f"{error.filename} may not be used ({error.strerror}): change that, or name a copy")
        elif isinstance(error, FileNotFoundError) and not Path(str(error.filename)).parent.exists():
            error = RunError(f"the directory of {error.filename} is gone: run the command again, and leave it in place")
        elif error.errno not in _STORAGE_ERRORS:
            return None
    logging.flush()
    print_error(error)
    return 2 if isinstance(error, UserError) else 1


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` as a command and ends the process.

    Exit status: what `main` returns (None is 0), 2 with one line on standard error after a `UserError`, 1 with one line
    after a `RunError` and with a traceback after anything else, 130 after Ctrl-C where `main` does not handle it.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files are bytes
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see quiet_start.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.addFilter(_is_worth_showing)
    handler.setFormatter(_LogFormatter())
    flags.FLAGS.set_default("logtostderr", True)  # to `sys.stderr` of the moment, which a progress bar takes over
    _silence_closed_loops()

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            return _parse_flags(arguments)
        except UserError as error:
            print_error(error)
            sys.exit(2)
        except SystemExit:  # of --help, with absl's status 1
            sys.exit(0)

    def run_and_exit(arguments: list[str]) -> None:
        try:
            status = main(arguments)
        except (Exception, KeyboardInterrupt) as error:
            status = report(error)
            if status is None:
                raise
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # all is done and said: one that comes now would belie the status
        gc.freeze()  # ending, the interpreter would look for garbage in all that was imported and traced
        sys.exit(status)

    app.run(run_and_exit, argv, flags_parser=parse)
