"""Train, study and ship a handwritten-digit classifier in JAX and Flax."""

import signal
import sys

# `python -m` is about to run a command. While it still imports (until `cli.run`), Ctrl-C ends it without a traceback.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
