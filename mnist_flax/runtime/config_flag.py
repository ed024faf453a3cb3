"""The flag `--config` and its overrides, and plain answers to what is wrong with them."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mnist_flax.runtime import cli, recipes
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.config import default_config, find_field, flatten, unknown_field


def define_flag(argv: Sequence[str] | None = None) -> tuple[flags.FlagHolder, list[str]]:
    """Defines `--config` and its overrides `--config.KEY=VALUE`; gives the flag and the arguments to parse.

    `configs/NAME.py` names a recipe of the project from any directory, unless such a file is there.
    """
    config_flags.register_flag_parser_for_type(int, _IntegerOrNone())
    config_flags.register_flag_parser_for_type(str, _TextOrNone())
    try:
        with cli.flag_errors():
            expanded = flags.FLAGS.read_flags_from_files(list(sys.argv if argv is None else argv))
        program, *words = _joined(expanded)
        # ml_collections wants the recipe before its overrides; to a user their order means nothing.
        named = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
        arguments = [
            program,
            *(f"--config={recipes.find(name)}" for name in named),
            *(word for word in words if not word.startswith("--config=")),
        ]
        _check_names(arguments)
        if named:
            recipes.load(named[-1])  # ml_collections would bury what is wrong with it
        with cli.flag_errors():
            holder = config_flags.DEFINE_config_file(
                "config",
                str(recipes.RECIPES / "default.py"),
                "recipe to run, a Python file whose get_config() returns a ConfigDict; "
                "override any field with --config.KEY=VALUE.",
                sys_argv=arguments,  # which it reads at once, before any command is there to report a mistake
            )
    except UserError as error:
        cli.print_error(error)
        sys.exit(2)
    return holder, arguments


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises UserError for words that belong to no flag, with what was probably meant."""
    if len(argv) < 2:
        return
    word = argv[1]
    key, equals, _ = word.removeprefix("config.").partition("=")
    recipe = word if word.endswith(".py") else f"configs/{word}.py"
    if word in ("true", "false", "True", "False"):
        hint = f"a field is switched by --config.KEY={word}, in one word"
    elif equals and (field := find_field(key)):
        hint = f"did you mean --config.{field}={word.partition('=')[2]}?"
    elif Path(recipes.find(recipe)).is_file():
        hint = f"did you mean --config={recipe}?"
    else:
        hint = "override a field with --config.KEY=VALUE"
    raise UserError(f"{word!r} is no flag: {hint}")


def recipe_path() -> str:
    """Path of the recipe that `--config` named."""
    return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]  # get_config's argument follows


# With ml_collections' own parsers no field could be set back to None.
class _IntegerOrNone(flags.IntegerParser):
    def parse(self, argument):
        return None if argument == "None" else super().parse(argument)


class _TextOrNone(flags.ArgumentParser):
    def parse(self, argument):
        return None if argument == "None" else super().parse(argument)


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config PATH`, in any spelling of absl's, as one word `--config=PATH`."""
    words = iter(argv)
    joined = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            value = value if equals else next(words, "")
            if value.startswith("-"):
                raise UserError(f"--config names nothing before {value}: give a recipe, such as configs/default.py")
            word = f"--config={os.path.expanduser(value)}"
        joined.append(word)
    return joined


def _check_names(arguments: Sequence[str]) -> None:
    fields = flatten(default_config())
    for key in (found[1] for argument in arguments if (found := re.match(r"--?config\.([^=]+)", argument))):
        if group := [name for name in fields if name.startswith(f"{key}.")]:
            raise UserError(f"config.{key} is a group of fields: override one, such as config.{group[0]}")
        if key not in fields:
            raise unknown_field(key, fields)
