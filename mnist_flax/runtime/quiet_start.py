"""What a command imports first: until `cli.run`, while it still imports, Ctrl-C ends it quietly."""

import gc
import signal
import sys

_main = getattr(sys.modules["__main__"], "__spec__", None)
if _main is not None and _main.name.startswith(("mnist_flax.", "experiments.")):  # not another program's process
    gc.set_threshold(500_000)  # what imports and tracing make stays; garbage was looked for in it again and again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
