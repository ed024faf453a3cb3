"""Commands that are printed work when they are pasted."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from mnist_flax.experiments.research import confirm, outputs
from mnist_flax.runtime.config import default_config
from tests.commands import environment

ODD = [
    "a:b",
    "a b",
    "it's",
    'a"b',
    "a#b",
    "a?b",
    "$(touch x)",
    "a;b&c",
    "a\nb",
    "-x",
    "a\\b",
    "*",
    "\u00e9\u202e",
    "a\t'\\:b",
]


@pytest.mark.parametrize("name", ODD)
def test_words_come_back_from_a_shell(name, tmp_path):
    line = outputs.command("printf", "%s", os.fsdecode(b"\xff'") + name)
    assert "\n" not in line
    ran = subprocess.run(["bash", "-c", os.fsencode(line)], cwd=tmp_path, capture_output=True, check=True)
    assert ran.stdout == b"\xff'" + os.fsencode(name) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a:b c", 'it\'s # a ? "study"\n'])
def test_the_command_in_a_winner_runs_it(name, tmp_path, monkeypatch):
    place = tmp_path / name
    place.mkdir()
    study = optuna.create_study(study_name=name)
    study.add_trial(optuna.create_trial(value=0.5, params={}, distributions={}, user_attrs={"config": {"seed": 3}}))
    monkeypatch.chdir(tmp_path)
    path = confirm.write_winner(place.relative_to(tmp_path), study, default_config())
    line = path.read_text().splitlines()[1].removeprefix("# ")
    ran = subprocess.run(
        ["bash", "-c", f"{line} --config.batch_size=-1"],
        cwd=tmp_path,
        env=environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "config.batch_size=-1 is out of range" in ran.stderr, ran.stderr
