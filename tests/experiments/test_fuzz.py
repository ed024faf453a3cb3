"""The targets of the input campaign under random inputs, and what the campaign found, one test each."""

import importlib.util
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnist_flax.data import datasets, prepare
from mnist_flax.experiments.fuzz import json_values, targets
from mnist_flax.experiments.fuzz.targets import TARGETS
from mnist_flax.inference import classifier
from mnist_flax.ocr import decode, page_reader
from mnist_flax.runtime import config, run_dir, terminal
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.metrics_log import read_records
from tests.commands import ROOT, command, environment, refusal

LIGHT = [name for name in TARGETS if name != "web"]  # of test_app.py and test_attacks.py


@pytest.fixture(scope="module", params=LIGHT)
def target(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.idx, "SPLIT_SIZES", {"train": 3, "test": 2})
        chosen = TARGETS[request.param]
        yield chosen, chosen.make(directory), list(chosen.seeds())


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.integers(0, 10**6), seed=st.integers(0, 2**64), changes=st.integers(1, 6), binary=st.booleans())
def test_input_is_valid_or_gets_one_line(target, chosen, seed, changes, binary):
    kind, feed, seeds = target
    content, generator = seeds[chosen % len(seeds)], random.Random(seed)
    for _ in range(changes):
        if kind.is_json and not binary:
            content = json_values.mutate(content, generator)
        else:
            place = generator.randrange(len(content) + 1)
            change = generator.choice([b"", generator.randbytes(2), content[:9]])
            content = content[:place] + change + content[place + generator.randrange(4) :]
    targets.feed_once(feed, content)


def test_the_seeds_are_valid(target):
    _, feed, seeds = target
    assert targets.feed_once(feed, seeds[0])


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="Atheris is not installed")
def test_the_campaign_runs_and_counts(tmp_path):
    out = command("experiments.fuzz", "--seconds=2", "--targets=json,calibration", f"--output={tmp_path}").stdout
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["json"], ["calibration"])]
    assert len(rows) == 2
    for row in rows:
        inputs, valid, refused = (int(cell.replace(",", "")) for cell in row[1:4])
        assert inputs > 50 and inputs == valid + refused and refused > 0
        assert row[-1] == "0"
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_gets_one_line():
    assert "is unknown: choose from idx" in refusal("experiments.fuzz", "--targets=nonsense")


# What it found


OVERRIDES = ["--config.modle.x=3", "--config._h", "--config.=3", "--config.seed[0]=1", "--config.seed=" + "(" * 5_000]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override[:30])
@pytest.mark.parametrize("module", ["mnist_flax.main", "experiments.study"])
def test_a_mistake_in_an_override_is_no_traceback_even_without_a_recipe(override, module):
    if module == "experiments.study" and override != "--config.modle.x=3":
        pytest.skip("one is enough to know that it is the same code")
    refusal(module, override)


def test_names_that_no_file_can_have_get_one_line(tmp_path):
    long = "x" * 300
    for arguments in (
        ["mnist_flax.main", f"--workdir={long}"],
        ["mnist_flax.main", "--config.data_dir=~nobody-here/x"],
        ["mnist_flax.evaluate", tmp_path / long],
    ):
        refusal(*arguments)


def test_a_directory_whose_name_is_no_text_is_printed(tmp_path):
    workdir = tmp_path / b"\xff\n[red".decode(errors="surrogateescape")
    workdir.mkdir()
    (workdir / "other").touch()
    process = [sys.executable, "-m", "mnist_flax.main", f"--workdir={workdir}"]
    done = subprocess.run(process, capture_output=True, env=environment(), cwd=ROOT)
    assert done.returncode == 2 and done.stdout == os.fsencode(workdir) + b"\n"
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1 and b"neither empty" in done.stderr


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\0", b"1" * 10_000, b""], ids=ascii)
def test_json_that_no_parser_takes_is_refused(tmp_path, content):
    for name in ("config.json", "summary.json", "calibration.json"):
        (tmp_path / name).write_bytes(content)
    for read in (run_dir.read_config, run_dir.read_summary, lambda place: classifier._read(place / "calibration.json")):
        with pytest.raises(UserError):
            read(tmp_path)


def test_a_file_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="no regular file"):
        run_dir.read_config(tmp_path)


def test_a_file_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(UserError, match="is larger than"):
        run_dir.read_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", 10**400),
        ("num_epochs", 2**31),
        ("eval_batch_size", 10**12),
        ("data_dir", "a\0b"),
        ("data_dir", "\ud800"),
        ("archive_dir", "~nobody-here/x"),
        ("model.channels", [65_536, 65_536, 65_536]),
        ("model.dense", [65_536, 65_536]),
    ],
    ids=str,
)
def test_a_recorded_config_that_could_not_be_run_is_refused(tmp_path, key, value):
    fields = config.default_config().to_dict()
    *parents, name = key.split(".")
    (fields[parents[0]] if parents else fields)[name] = value
    (tmp_path / "config.json").write_text(json.dumps({"config": fields}))
    with pytest.raises(UserError, match=r"config\.json was damaged"):
        run_dir.read_config(tmp_path)


@pytest.mark.parametrize(
    "members",
    [3, [3], [[]], [{}], [{"path": "a", "seed": 1e999, "test_accuracy": 0.5}], [{"seed": 10**400}], [None] * 1_001],
    ids=lambda members: str(members)[:40],
)
def test_an_ensemble_of_what_are_no_members_is_refused(tmp_path, members):
    recorded = json.loads(targets.config_seeds()[0]) | {"members": members}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"config\.json"):
        run_dir.read_members(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"test_accuracy": float("nan")},
        {"test_accuracy": "high"},
        {"test_accuracy": None},
        {"train_seconds": -1},
        {"parameters": 10**400},
        {"dataset": 3},
        {"device": None},
        {"seed": "0"},
        {"other": [1]},
        {"device": "\ud800"},
        {"device": "\x1b]0;title\x07"},
        {"\n": 1},
    ],
    ids=str,
)
def test_a_summary_that_cannot_be_shown_is_refused(tmp_path, change):
    (tmp_path / "summary.json").write_text(json.dumps(targets.SUMMARY | change))
    with pytest.raises(UserError, match="is damaged"):
        run_dir.read_summary(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "null", "3", '"text"', '{"dataset": "digits"}'])
def test_a_summary_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        run_dir.read_summary(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"epoch": "x"}, {"epoch": 1.5}, {"epoch": 0}, {"loss": 1e999}, {"loss": 10**400}, {"accuracy": 1.1}],
    ids=str,
)
def test_records_that_cannot_be_drawn_are_refused(tmp_path, change):
    record = json.loads(targets.metrics_seeds()[1]) | change
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_records(tmp_path / "metrics.jsonl")


def test_names_in_brackets_are_printed_and_not_taken_for_markup(capsys):
    terminal.print_summary(targets.SUMMARY | {"device": "[/red] [bold]x"})
    assert "[/red] [bold]x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "info",
    [
        {"alternativeFileFormats": None},
        {"splits": [{"name": "train", "shardLengths": [1e999]}, {"name": "test", "shardLengths": [1]}]},
        {"splits": [{"name": "train", "shardLengths": [1]}, {"name": "x" * 300, "shardLengths": [1]}]},
        {"name": "../digits"},
    ],
    ids=lambda info: str(info)[:60],
)
def test_a_damaged_description_of_a_dataset_gets_one_line(digits_data_dir, tmp_path, info):
    place = shutil.copytree(digits_data_dir / "digits", tmp_path / "digits") / "1.0.0" / "dataset_info.json"
    place.write_text(json.dumps(json.loads(targets.dataset_seeds()[0]) | info))
    with pytest.raises(UserError, match="is damaged"):
        prepare.check_shards(prepare.prepare("digits", str(tmp_path)).directory)


def test_a_huge_picture_in_a_dataset_is_not_decoded():
    class Source:
        def __getitems__(self, positions):
            file = io.BytesIO()
            Image.new("L", (9_000, 9_000)).save(file, "PNG")
            return [{"image": file.getvalue(), "label": 0}] * 1_000

    with pytest.raises(ValueError, match="not 28 x 28"):
        datasets._read(Source(), list(range(1_000)))


@pytest.mark.parametrize("levels", [[0, 1], [30_000, 30_001], [65_534, 65_535]])
@pytest.mark.parametrize("layout", page_reader.LAYOUTS)
def test_a_picture_of_hardly_any_contrast_holds_nothing(levels, layout):
    picture = np.full((40, 60), levels[0], np.uint16)
    picture[8:32, 10:14] = picture[8:12, 26:34] = levels[1]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "TIFF")
    grey = decode.load(file, "it")
    assert not page_reader.find(grey, layout).lattices


def dots(side: int) -> np.ndarray:
    """Nothing but marks as large as the smallest digits."""
    picture = np.ones((side, side), np.float32)
    for i in range(49):
        picture[i // 7 :: 10, i % 7 :: 10] = 0
    return picture


def test_a_picture_of_nothing_but_marks_is_refused_and_not_taken_apart():
    with pytest.raises(UserError, match="no line of digits"):
        page_reader.find(dots(500), "line")


def test_what_could_be_frames_is_not_held_against_all_that_could_be_lines():
    """Twenty thousand of each: minutes, if it were pair by pair."""
    assert not page_reader.find(dots(1_400), "page").lattices


def test_a_cache_that_is_no_archive_of_arrays_is_made_anew(tmp_path):
    np.save(tmp_path / "cache.npy", np.zeros(3))
    (tmp_path / "short.npz").write_bytes(b"PK\3\4" + struct.pack("<I", 3))
    for path in tmp_path.iterdir():
        assert datasets._read_cache(path, "") is None
