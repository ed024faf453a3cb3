import re

import pytest

from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import recipes
from tests.commands import ROOT, refusal

RECIPE = """from mnist_flax.configs import default
def get_config():
    config = default.get_config()
    {}
    return config
"""


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        ("import nothing_of_the_kind\n", ", line 1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("from mnist_flax.configs import nothing_of_the_kind\n", ", line 1: ImportError"),
        ("\ndef get_config(:\n", ", line 2: SyntaxError"),
        ("nothing = 1\n", " has no function get_config()"),
        (RECIPE.replace("return config", "").format("pass"), ": get_config() returns nothing"),
        (RECIPE.format("config.num_epochs = '3'"), ", line 4: TypeError"),
        (RECIPE.format("config.model.channels = 64"), ", line 4: TypeError"),
        (RECIPE.format("config.optimzer.name = 'sgd'"), ", line 4: AttributeError: 'optimzer' Did you mean"),
        (RECIPE.format("1 / 0"), ", line 4: ZeroDivisionError: division by zero"),
        (RECIPE.format("raise SystemExit(0)"), ", line 4: SystemExit: 0"),
        (b"\xff\xfe", ", line 1: SyntaxError"),
    ],
)
def test_a_fault_in_a_recipe_is_named_with_its_line(recipe, found, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    for arguments in ([f"--config={path}"], ["--config", path, "--config.seed=1"]):
        error = refusal("mnist_flax.main", *arguments)
        assert error.startswith(f"error: {path}{found}")


def test_the_recipe_in_the_readme_is_one(tmp_path):
    (example,) = re.findall(r"```python\n(# configs/wide.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace: dict = {}
    exec(example, namespace)
    config_lib.check_config(namespace["get_config"]())


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_every_recipe_is_valid(recipe):
    if recipe.name != "__init__.py":
        import importlib

        config_lib.check_config(importlib.import_module(f"mnist_flax.configs.{recipe.stem}").get_config())
