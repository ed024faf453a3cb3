"""Whether what the extras bring is installed: for commands, before they import what needs it."""

import importlib.util

from mnist_flax.runtime.cli import UserError

_NEEDED = {
    "optuna": "studies need Optuna: pip install 'mnist_flax[research]'",
    "torch": "what is compared with needs PyTorch: pip install 'mnist_flax[peers]'",
    "atheris": "the campaign needs Atheris, on Linux: pip install 'mnist_flax[fuzz]'",
}


def require(package: str) -> None:
    """Raises UserError unless a package, one of `_NEEDED`, is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(_NEEDED[package])
