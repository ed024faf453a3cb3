import contextlib
import random
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.runtime.cli import RunError, UserError
from mnist_flax.training import checkpoint
from tests.commands import ROOT


def state(step):
    key = jax.random.key(step)
    return {"kernel": jax.random.normal(key, (64, 32)), "step": jnp.int32(step), "empty": {}}


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))


def save(directory, accuracies, keep=2):
    checkpoints = checkpoint.Checkpoints(directory, keep)
    for step, accuracy in enumerate(accuracies, 1):
        checkpoints.save(step, state(step), {"note": step}, accuracy)
    checkpoints.close()


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_latest_and_best_are_kept(tmp_path):
    save(tmp_path, [0.1, 0.9, 0.3, 0.4, 0.5])
    assert steps(tmp_path) == [2, 4, 5]
    best, extra = checkpoint.load(tmp_path, "best", ABSTRACT)
    assert equal(best, state(2)) and extra == {"note": 2}
    last, _ = checkpoint.load(tmp_path, "last", ABSTRACT)
    assert equal(last, state(5))


def test_nan_never_becomes_best_and_never_evicts_it(tmp_path):
    save(tmp_path, [0.5, float("nan"), 0.1, float("nan")], keep=1)
    assert steps(tmp_path) == [1, 4]
    assert equal(checkpoint.load(tmp_path, "best", ABSTRACT)[0], state(1))


def test_checkpoints_without_a_score_do_not_pile_up(tmp_path):
    save(tmp_path, [0.5, None, None, None], keep=1)
    assert steps(tmp_path) == [1, 4]


def test_without_any_score_there_is_no_best(tmp_path):
    save(tmp_path, [None, None])
    assert equal(checkpoint.load(tmp_path, "last", ABSTRACT)[0], state(2))
    with pytest.raises(UserError, match=r"use .*checkpoint=last"):
        checkpoint.load(tmp_path, "best", ABSTRACT)


@pytest.mark.parametrize(
    "damaged, which, way",
    [
        ((3,), "last", ".*checkpoint=best can be"),
        ((2,), "best", ".*checkpoint=last can be"),
        ((2, 3), "last", "make it anew"),
        ((2, 3), "best", "make it anew"),
    ],
)
def test_a_damaged_checkpoint_is_told_with_another_only_if_that_can_be_read(damaged, which, way, tmp_path):
    save(tmp_path, [0.1, 0.9, 0.2])
    for step in damaged:
        data = max((tmp_path / str(step)).rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    with pytest.raises(RunError, match=rf"checkpoint {3 if which == 'last' else 2} in .* cannot be read .*: {way}"):
        checkpoint.load(tmp_path, which, ABSTRACT)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "empty"])
@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_the_latest_is_found_and_the_one_before_restored(harm, seed, tmp_path):
    """One random file of the latest checkpoint is harmed: what is restored is a state that was saved, whole."""
    save(tmp_path, [0.9, 0.1, 0.2])
    chance = random.Random(seed)
    file = chance.choice(sorted(path for path in (tmp_path / "3").rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    if harm == "delete":
        file.unlink()
    elif harm == "flip" and content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if harm == "truncate" else b"")
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    restored, extra = checkpoints.restore_latest(lambda: ABSTRACT)
    step = int(restored["step"])
    assert step in (2, 3) and extra == {"note": step} and equal(restored, state(step))
    assert steps(tmp_path)[-1] == step
    checkpoints.save(step + 1, state(step + 1), {"note": step + 1}, 0.3)  # training goes on over the damaged step
    checkpoints.close()
    assert equal(checkpoint.load(tmp_path, "last", ABSTRACT)[0], state(step + 1))


def test_nothing_readable_is_an_error_and_nothing_at_all_is_not(tmp_path):
    assert checkpoint.Checkpoints(tmp_path / "new", 2).restore_latest(lambda: ABSTRACT) is None
    save(tmp_path / "run", [0.1])
    for path in (tmp_path / "run" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint"):
        checkpoint.Checkpoints(tmp_path / "run", 2).restore_latest(lambda: ABSTRACT)


@pytest.mark.parametrize("wanted", [{"step": jax.ShapeDtypeStruct((), "float32")}, {"more": ABSTRACT["step"]}])
def test_what_does_not_fit_is_not_called_damaged_and_stays_as_it_is(wanted, tmp_path):
    save(tmp_path, [0.1, 0.2])
    with pytest.raises(RunError, match="go on with the version that wrote them"):
        checkpoint.Checkpoints(tmp_path, 2).restore_latest(lambda: ABSTRACT | wanted)
    with pytest.raises(RunError, match="is of another version"):
        checkpoint.load(tmp_path, "last", ABSTRACT | wanted)
    assert steps(tmp_path) == [1, 2] and equal(checkpoint.load(tmp_path, "last", ABSTRACT)[0], state(2))


def test_what_a_killed_save_left_behind_is_no_checkpoint(tmp_path):
    save(tmp_path, [0.1, 0.2])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    assert int(checkpoints.restore_latest(lambda: ABSTRACT)[0]["step"]) == 2
    checkpoints.save(3, state(3), {}, 0.3)
    checkpoints.close()
    assert steps(tmp_path) == [2, 3] and not list(tmp_path.glob("*tmp*"))


def test_what_comes_to_a_closed_event_loop_is_not_shown_and_all_else_is():
    """A failed save tells an event loop that is closed of each further array: one line is enough."""
    code = (
        "import sys; from types import SimpleNamespace as Case; shown = []; sys.unraisablehook = shown.append\n"
        "from mnist_flax.runtime import cli\n"
        "errors = RuntimeError('Event loop is closed'), OSError('no space')\n"
        "cases = [Case(exc_value=error, object=thing) for error in errors for thing in (None, print)]\n"
        "def main(argv):\n"
        "    for case in cases: sys.unraisablehook(case)\n"
        "    assert shown == cases[1:]\n"
        "cli.run(main, ['command'])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_clock_that_jumps_while_it_is_saved_fails_no_checkpoint(tmp_path, monkeypatch):
    clock = time.time
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    for step, jump in enumerate((86_400, -86_400, 90 * 86_400), 1):
        checkpoints.save(step, state(step), {}, None)
        monkeypatch.setattr(time, "time", lambda jump=jump: clock() + jump)  # as after a suspension
        checkpoints.wait()
        monkeypatch.setattr(time, "time", clock)
    checkpoints.close()
    assert equal(checkpoint.load(tmp_path, "last", ABSTRACT)[0], state(3))


def test_full_disk_is_reported_in_one_line_and_leaves_what_was_saved(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        checkpoints = checkpoint.Checkpoints(tmp_path / "run", 2)
        checkpoints.save(1, state(1), {}, 0.1)
        checkpoints.wait()
        with contextlib.suppress(OSError), (tmp_path / "other").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(512))
        with pytest.raises(RunError, match="could not be written") as caught:
            checkpoints.save(2, state(2), {}, 0.2)
            checkpoints.wait()
        assert "\n" not in str(caught.value)
        assert equal(checkpoint.load(tmp_path / "run", "last", ABSTRACT)[0], state(1))
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_checkpoint_of_arrays_on_devices_as_earlier_versions_saved_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_get", lambda tree: tree)
    save(tmp_path, [0.1])
    monkeypatch.undo()
    assert (tmp_path / "1" / "state" / "_sharding").exists()
    assert equal(checkpoint.load(tmp_path, "last", ABSTRACT)[0], state(1))
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    assert equal(checkpoints.restore_latest(lambda: ABSTRACT)[0], state(1))
    checkpoints.save(2, state(2), {}, 0.2)
    checkpoints.close()
    assert equal(checkpoint.load(tmp_path, "last", ABSTRACT)[0], state(2))
