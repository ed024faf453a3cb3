import pytest

from mnist_flax.experiments.faults.sabotage import FIELDS
from mnist_flax.runtime import run_dir
from tests.commands import command, refusal


@pytest.mark.slow
def test_files_are_whole_while_a_run_writes_them_and_old_checkpoints_go(digits_data_dir, tmp_path):
    workdir = tmp_path / "run"
    fields = {**FIELDS, "data_dir": digits_data_dir}
    del fields["num_epochs"]
    overrides = [f"--config.{key}={value}" for key, value in fields.items()]
    out = command("experiments.long_run", "--epochs=30", f"--workdir={workdir}", "--", *overrides).stdout
    assert "30 epochs" in out and "28-30" in out
    seen = run_dir.read_json(tmp_path / "run.json")["epochs"]
    assert len(seen) > 3
    for observation in seen:
        assert 0 <= observation["epoch"] - observation["epochs_in_tensorboard"] <= 1, observation
        assert observation["checkpoints"] <= 4  # two, the best, and the one that is being replaced
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert kept[-2:] == [29 * 8, 30 * 8] and len(kept) <= 3


def test_what_training_refuses_is_told_once(tmp_path):
    assert "out of range" in refusal("experiments.long_run", f"--workdir={tmp_path}", "--", "--config.batch_size=0")


def test_a_workdir_that_names_no_directory_is_refused():
    assert "--workdir= names nothing" in refusal("experiments.long_run", "--workdir=", "--", "--config.batch_size=0")
