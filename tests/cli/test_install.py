"""The package as it is installed from a wheel, beside a user's own `configs` and `experiments`."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mnist_flax.runtime import recipes
from tests.commands import ROOT, environment

RECIPE = "from {} import digits\ndef get_config():\n    config = digits.get_config()\n    {}\n    return config\n"
LOAD = (
    "import sys; from absl import flags; from mnist_flax.runtime import config_flag; "
    "holder, arguments = config_flag.define_flag(sys.argv); flags.FLAGS(arguments); print(holder.value.seed)"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter that has the wheel of this revision, and the installed dependencies."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install -e '.[test]'")
    place = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    venv.create(place / "venv", with_pip=False, symlinks=True)
    site = next((place / "venv" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(next(place.glob("*.whl"))).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # its own .pth files are not followed
    return place / "venv" / "bin" / "python"


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's directory of recipes, one of which has the name of one of ours."""
    for name in ("configs", "experiments"):
        (tmp_path / name).mkdir()
    (tmp_path / "configs" / "digits.py").write_text(RECIPE.format("mnist_flax.configs", "config.seed = 777"))
    (tmp_path / "configs" / "mine.py").write_text(RECIPE.format("configs", "pass"))
    (tmp_path / "configs" / "base.py").touch()
    (tmp_path / "experiments" / "own.py").write_text("print('own')")
    return tmp_path


def out_of(python: Path, cwd: Path, *arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [python, *map(str, arguments)], cwd=cwd, env=environment() | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_configs_and_experiments_are_the_users(python, project):
    assert out_of(python, project, "-c", LOAD, "--config=configs/mine.py") == "777\n"
    assert out_of(python, project, "-c", LOAD, "--config=configs/classic.py") == "0\n"  # ours, which is not there
    assert out_of(python, project, "-m", "experiments.own") == "own\n"
    notebook = (
        "import configs.base; from mnist_flax.runtime import config; config.check_config(config.default_config())"
    )
    out_of(python, project, "-c", notebook)
    recipe = project / "configs" / "mine.py"
    error = out_of(python, project.parent, "-m", "mnist_flax.main", f"--config={recipe}", status=2)
    assert "No module named 'configs' (the recipes of this project are in mnist_flax.configs)" in error


def test_every_recipe_is_imported_and_run_from_anywhere(python, tmp_path):
    shipped = sorted(path.relative_to(recipes.RECIPES) for path in recipes.RECIPES.rglob("*.py"))
    names = [".".join(recipe.with_suffix("").parts) for recipe in shipped]
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).get_config().dataset)"
    found = out_of(python, tmp_path, "-c", code, *(f"mnist_flax.configs.{name}" for name in names)).split()
    assert len(found) == len(shipped) > 10 and set(found) == {"mnist", "digits"}
    assert out_of(python, tmp_path, "-c", LOAD, "--config=configs/studies/optimizers.py", "--config.seed=3") == "3\n"


def test_research_commands_come_with_the_wheel(python, tmp_path):
    error = out_of(python, tmp_path, "-m", "mnist_flax.experiments.study", "--config=configs/classic.py", status=2)
    assert "must define either search_space() or sweep()" in error
