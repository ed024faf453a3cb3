"""Whether what the extras bring is installed: for commands, before they import what needs it."""

import importlib.util

from mnist_flax.cli import UserError


def require_optuna() -> None:
    """Raises UserError unless Optuna is installed."""
    _require("optuna", "studies need Optuna: pip install 'mnist_flax[research]'")


def require_torch() -> None:
    """Raises UserError unless PyTorch is installed."""
    _require("torch", "what is compared with needs PyTorch: pip install 'mnist_flax[peers]'")


def require_atheris() -> None:
    """Raises UserError unless Atheris is installed."""
    _require("atheris", "the campaign needs Atheris, on Linux: pip install 'mnist_flax[fuzz]'")


def _require(package: str, message: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(message)
