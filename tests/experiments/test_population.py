import json

import numpy as np
import pytest

from tests.commands import command, refusal
from tests.experiments.test_members import SMALL


def test_command_gives_the_same_on_any_number_of_devices(digits_data_dir, tmp_path):
    fields = [f"--config.{key}={value!r}".replace("'", "") for key, value in SMALL.items()]
    arguments = (*fields, f"--config.data_dir={digits_data_dir}", "--seeds=3")
    outs, results = [], []
    for count in (1, 3):
        path = tmp_path / f"{count}.json"
        outs.append(command("experiments.population", *arguments, f"--output={path}", devices=count).stdout)
        results.append(json.loads(path.read_text())["members"])
    for one, three in zip(*results, strict=True):
        assert one["train_loss"] == pytest.approx(three["train_loss"], rel=1e-3)
        assert one["test_accuracy"] == pytest.approx(three["test_accuracy"], abs=0.003)
    accuracies = [member["test_accuracy"] for member in results[0]]
    assert f"{np.mean(accuracies):.3%}" in outs[0] and f"{np.std(accuracies, ddof=1):.3%}" in outs[0]
    assert "seeds" in refusal("experiments.population", "--seeds=0")


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "a.json").mkdir()
    for place, hint in (
        (tmp_path / "a.json", "it is a directory"),
        (tmp_path / "no" / "file.json", "No such file or directory"),
        ("/proc/file.json", "cannot be written"),
    ):
        ended = command("experiments.population", "--config=configs/digits.py", f"--output={place}", status=2)
        assert hint in ended.stderr and len(ended.stderr.splitlines()) == 1 and not ended.stdout
