"""Whether what the extra `research` brings is installed: for commands, before they import what needs it."""

import importlib.util

from mnist_flax.cli import UserError


def require_optuna() -> None:
    """Raises UserError unless Optuna is installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("studies need Optuna: pip install 'mnist_flax[research]'")
