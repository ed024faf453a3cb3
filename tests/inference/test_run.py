import json
import shutil

import jax
import numpy as np
import pytest

from mnist_flax.inference.run import load_run
from mnist_flax.runtime.cli import UserError
from tests.commands import command, records

TINY = (
    "--config=configs/digits.py",
    "--config.num_epochs=3",
    "--config.model.channels=(2,)",
    "--config.model.dense=()",
)


@pytest.fixture(scope="module")
def place(digits_data_dir, tmp_path_factory):
    """A run whose best checkpoint is seldom its last."""
    place = tmp_path_factory.mktemp("run") / "run"
    rate = "--config.optimizer.learning_rate=0.3"
    command("mnist_flax.main", *TINY, rate, f"--config.data_dir={digits_data_dir}", f"--workdir={place}")
    return place


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_gives_the_accuracy_that_was_recorded_with_it(which, place):
    from mnist_flax.data import datasets

    trained = load_run(place, which)
    accuracies = [record["accuracy"] for record in records(place) if record["split"] == "validation"]
    validation = datasets.load(trained.config).validation
    logits = np.asarray(trained.model.apply(trained.variables, validation.images / np.float32(255)))
    accuracy = (logits.argmax(1) == validation.labels).mean()
    wanted = accuracies[-1] if which == "last" else max(accuracies)
    assert accuracy == pytest.approx(wanted, abs=1.5 / len(validation.labels))
    assert trained.directory == place and trained.class_names == tuple("0123456789") and not trained.members


def test_without_a_name_the_config_chooses_the_checkpoint(place, tmp_path):
    shutil.copytree(place, tmp_path / "run")
    recorded = json.loads((place / "config.json").read_text())
    recorded["config"]["checkpoint"]["select"] = "best"
    (tmp_path / "run" / "config.json").write_text(json.dumps(recorded))
    for ours, theirs in zip(
        *map(jax.tree.leaves, (load_run(tmp_path / "run").variables, load_run(place, "best").variables)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_what_has_no_such_checkpoint_is_refused(place, digits_ensemble, tmp_path):
    shutil.copy(place / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet: let the run finish an epoch"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="choose no checkpoint"):
        load_run(digits_ensemble[0], "best")
