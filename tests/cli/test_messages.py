"""An error names only flags that the command which prints it has."""

import ast
import re

import pytest
from absl import flags

from mnist_flax.data import prepare
from mnist_flax.runtime import cli
from tests.commands import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("mnist_flax", "experiments")
    for path in (ROOT / room).rglob("*.py")
}


def flags_of(module: str) -> set[str]:
    """The flags that this module, or one that it imports as it is loaded, defines."""
    found, seen, waiting = {"flagfile", "help"}, set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        text = MODULES[name].read_text()
        found |= set(re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)", text))
        found |= {"config"} if "define_flag(" in text else set()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom):
                waiting += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def named_in_errors(module: str) -> set[str]:
    """The flags that the texts of this module's errors name; commands that they advise have flags of their own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")):
            for text in ast.walk(node):
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and "python -m" not in text.value:
                    found |= set(re.findall(r"(?<![\w-])--([a-z]\w*)", text.value))
    return found


def test_a_module_names_no_flag_but_its_own():
    """Others may be of a command that is not the one running: `cli.option` knows."""
    named = {module: found for module in MODULES if (found := named_in_errors(module))}
    assert len(named) > 10
    foreign = {module: found - flags_of(module) for module, found in named.items()}
    assert not {module: found for module, found in foreign.items() if found}


@pytest.mark.parametrize(
    ("defined", "wanted", "unwanted"),
    [
        ((), "TFDS_DATA_DIR=DIR in the environment", "config"),
        (("data_dir",), "--data_dir=DIR", "--config"),
        (("config",), "--config.archive_dir=DIR", "--data_dir"),
    ],
)
def test_ways_to_the_data_are_those_of_the_command(defined, wanted, unwanted, monkeypatch):
    values = flags.FlagValues()
    for name in defined:
        flags.DEFINE_string(name, None, "", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    assert wanted in prepare._ways_out() and unwanted not in prepare._ways_out()
    assert cli.option("data_dir", "X") == ("--data_dir=X" if "data_dir" in defined else "data_dir=X")
