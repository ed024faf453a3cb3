"""Finding and running recipes: Python files with a function `get_config()`."""

import inspect
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mnist_flax.runtime import cli
from mnist_flax.runtime.cli import UserError

# In a clone a link to the directory beside the package. Never imported as `configs`: that name is the user's.
RECIPES = Path(__file__).resolve().parents[1] / "configs"


def load(name: str) -> ConfigDict:
    """The config of a recipe: FILE, or FILE:ARGUMENT for `get_config(ARGUMENT)`.

    `configs/NAME.py` names a recipe of the project from any directory, unless such a file is there.

    Raises:
      UserError: it is no file, or fails; the line is named.
    """
    path, colon, argument = find(name).partition(":")
    if not Path(path).is_file():
        raise UserError(_no_recipe(name, path))
    if not path.endswith(".py"):
        raise UserError(f"{path} is not a Python file: name a recipe, such as configs/default.py")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} has no function get_config(): see configs/default.py")
        given = (argument,) if colon else ()
        _check_argument(path, get_config, given)
        if (config := get_config(*given)) is None:
            raise UserError(f"{path}: get_config() returns nothing: end it with `return config`")
        return config
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        user_own = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "configs"
        hint = " (the recipes of this project are in mnist_flax.configs)" if user_own else ""
        raise UserError(f"{path}{where}: {type(error).__name__}: {cli.reason(error)}{hint}") from error


def _no_recipe(name: str, path: str) -> str:
    if Path(name).is_file():
        return f"{name} cannot be a recipe: what follows a colon is get_config's argument; rename it, or copy it"
    shipped = sorted(recipe.relative_to(RECIPES.parent) for recipe in RECIPES.rglob("*.py"))
    near = [recipe for recipe in shipped if path and recipe.stem == Path(path).stem]
    hint = f"did you mean --config={near[0]}?" if near else "name a recipe, such as configs/default.py"
    return f"{path or 'an empty name'} is no file: {hint}"


def _check_argument(path: str, get_config: Callable, given: Sequence[str]) -> None:
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        way = f"leave out :{given[0]}" if given else f"give one, --config={path}:ARGUMENT"
        raise UserError(f"{path}: get_config() takes {'no' if given else 'an'} argument: {way}") from None


def find(name: str) -> str:
    """The name of a recipe as a path that is there, if one of the project's is meant."""
    file = name.partition(":")[0]
    shipped = file.startswith("configs/") and file.endswith(".py") and (RECIPES.parent / file).exists()
    return name.replace(file, str(RECIPES.parent / file), 1) if shipped and not Path(file).exists() else name
