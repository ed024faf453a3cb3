import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from mnist_flax.data import datasets
from mnist_flax.inference import formats
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import files
from mnist_flax.training import checkpoint


@pytest.fixture
def calls(monkeypatch):
    """What reaches the disk, in order: ("sync" or "replace", path)."""
    recorded = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        recorded.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    def replaced(source, target):
        recorded.append(("replace", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return recorded


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_it_is_done(calls, tmp_path):
    files.write(tmp_path / "summary.json", b"{}")
    assert (tmp_path / "summary.json").read_text() == "{}"
    path = tmp_path / "summary.json"
    assert calls == [("sync", path.with_name("summary.json.tmp")), ("replace", path), ("sync", tmp_path)]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        files.write(path, b"new")
    assert path.read_text() == "old"


def test_an_export_is_on_the_disk_before_it_is_done(calls, digits_run, tmp_path):
    trained = load_run(digits_run)
    path = formats.export(trained, datasets.load(trained.config), "stablehlo", tmp_path / "model.stablehlo").path
    assert calls[-2:] == [("replace", path), ("sync", tmp_path)]


def test_a_checkpoint_goes_only_when_a_later_one_is_on_the_disk(calls, tmp_path):
    def steps():
        return sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())

    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, {"kernel": jnp.full(1_000, float(step))}, {}, None)
        checkpoints.wait()
        saved = {path for path in (tmp_path / str(step)).rglob("*")} | {tmp_path / str(step), tmp_path}
        assert saved <= {path for kind, path in calls if kind == "sync"}
        assert steps() == ([1] if step == 1 else [step - 1, step])
        calls.clear()
    checkpoints.close()
    assert steps() == [3]
