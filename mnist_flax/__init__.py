"""Train, study and ship a handwritten-digit classifier in JAX and Flax.

    import mnist_flax as mf

    config = mf.get_config("configs/digits.py", num_epochs=5)
    run = mf.train(config, workdir="runs/demo")
    run.predict(images)

Nothing is imported before it is used: see `mnist_flax.api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_flax.api import Run, get_config, load, train
    from mnist_flax.runtime.cli import RunError, UserError

__all__ = ["Run", "RunError", "UserError", "get_config", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mnist_flax import api
    from mnist_flax.runtime import cli

    return getattr(cli if name.endswith("Error") else api, name)


def __dir__() -> list[str]:
    return __all__
