"""Train, study and ship a handwritten-digit classifier in JAX and Flax."""

import gc
import re
import signal
import sys

# `python -m` is about to run a command of ours. While it still imports (until `cli.run`), Ctrl-C ends it quietly.
_OURS = re.search(r" -m ?(mnist_flax|experiments)\b", " ".join(sys.orig_argv))
if _OURS:
    gc.set_threshold(500_000)  # what imports and tracing make stays; garbage was looked for in it again and again
if _OURS and sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
