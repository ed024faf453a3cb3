import signal
import subprocess
import sys

import pytest

from mnist_flax.runtime import cli
from tests.commands import ROOT


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_either_kind_ends_the_process(second):
    code = (
        "import os, signal; from mnist_flax.runtime import cli; stop = cli.Stop(); stop.can_wait = True; "
        f"os.kill(os.getpid(), signal.SIGTERM); assert stop.requested; os.kill(os.getpid(), {int(second)})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -second


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_anything_to_save_a_signal_ends_the_process_whatever_it_was_doing(first):
    code = (
        "import io, os, sys; from mnist_flax.runtime import cli\n"
        "cli.Stop('this command goes on'); sys.stdout = io.StringIO()\n"
        f"try:\n  os.kill(os.getpid(), {int(first)})\nexcept BaseException as error:\n  raise ImportError from error"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "this command goes on\n", "")


@pytest.mark.parametrize("late", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_does_not_belie_the_status(late):
    """All is done and said; what ends the interpreter, such as closing a pool of threads, takes its time."""
    code = (
        "import atexit, os; from mnist_flax.runtime import cli\n"
        f"atexit.register(os.kill, os.getpid(), {int(late)})\n"
        "cli.run(lambda argv: 3, ['command'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_what_tensorstore_tells_asyncio_is_not_shown_and_other_warnings_are(tmp_path):
    """Each array of a damaged checkpoint that cannot be read is logged, besides the one that is raised."""
    code = (
        "import logging; from mnist_flax.runtime import cli\n"
        "def main(argv):\n"
        "  logging.getLogger('asyncio').error('Future exception was never retrieved: tensorstore NOT_FOUND')\n"
        "  logging.getLogger('asyncio').error('another loop')\n"
        "  logging.getLogger('another').warning('tensorstore is slow')\n"
        "cli.run(main, ['command'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "NOT_FOUND" not in ended.stderr
    assert "another loop" in ended.stderr and "tensorstore is slow" in ended.stderr


@pytest.mark.parametrize("path", ["a:b", "c:/d", "./gs:/e", "10:30/run", "/data/x://y", "a b://c"])
def test_a_colon_alone_makes_no_url(path):
    cli.check_path(path, path)
