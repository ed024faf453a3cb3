import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import form_generator
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import run_dir
from tests.commands import ROOT, command, environment, refusal, start


def predict(*arguments, status: int = 0):
    return command("mnist_flax.predict", *arguments, status=status)


@pytest.fixture(scope="module")
def split(digits_run):
    return datasets.load(run_dir.read_config(digits_run)).test


@pytest.fixture(scope="module")
def sure(digits_run, split) -> list[int]:
    """Indices of test examples that the network answers, and answers right, of different digits."""
    trained = load_run(digits_run)
    logits = np.asarray(trained.model.apply(trained.variables, split.images / np.float32(255)))
    margin = np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2]
    right = logits.argmax(1) == split.labels
    return [int(np.argmax(margin * right * (split.labels == digit))) for digit in range(10)]


@pytest.fixture(scope="module")
def folder(split, sure, tmp_path_factory):
    """Dark digits on light paper, 7.png to 3.png, and what else may lie around."""
    folder = tmp_path_factory.mktemp("pictures")
    for digit in (3, 7):
        Image.fromarray(255 - split.images[sure[digit]]).resize((300, 300)).save(folder / f"{digit}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_one_digit(digits_run, folder):
    done = predict(digits_run, folder / "7.png", folder / "3.png")
    lines = done.stdout.splitlines()
    for line, digit in zip(lines, (7, 3), strict=True):
        assert line.startswith(f"{folder / f'{digit}.png'}: {digit} (")
    assert done.stderr == ""


def test_the_form_of_the_readme_is_read(digits_run):
    """Drawn by `form_generator` from test digits of this dataset, like those that a newcomer's first run knows."""
    readme = (ROOT / "README.md").read_text()
    ((name, layout, lines),) = re.findall(r"mnist_flax\.predict RUN (docs/\S+) (--layout=page) +# .*: (.*)", readme)
    out = predict(digits_run, name, layout, "--threshold=0").stdout
    assert out.splitlines() == [f"{name}:", *lines.split(", ")]
    assert f"@{name} " in readme  # the request to the server


def predict_listed(run_directory, listing: bytes, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mnist_flax.predict", run_directory, "-"],
        input=listing,
        capture_output=True,
        cwd=ROOT,
        env=environment(**variables),
    )


@pytest.mark.parametrize("ways", ["directory", "list", "both"])
def test_directories_and_lists(digits_run, folder, ways):
    names = f"{folder / '3.png'}\n\n{folder / '7.png'}\n"
    arguments = {"directory": [folder], "list": ["-"], "both": ["-", folder]}[ways]
    done = subprocess.run(
        [sys.executable, "-m", "mnist_flax.predict", str(digits_run), *map(str, arguments)],
        input=names,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    answers = [line.rpartition(": ")[2][0] for line in done.stdout.splitlines()]
    assert answers == ["3", "7"] * (2 if ways == "both" else 1)


def test_listed_names_may_be_any_bytes(digits_run, folder, tmp_path):
    name = bytes(shutil.copy(folder / "3.png", tmp_path / os.fsdecode(b"caf\xe9.png")))
    done = predict_listed(digits_run, name + b"\n", PYTHONIOENCODING="utf-8:strict")
    assert done.stdout.startswith(name + b": 3 ("), done.stderr


def test_a_reader_that_has_seen_enough_ends_it(digits_run, folder):
    """As in `predict ... | head -1`."""
    process = start("mnist_flax.predict", digits_run, folder)
    process.stdout.close()
    process.wait(300)
    assert (process.returncode, process.stderr.read()) == (141, "")
    process.stderr.close()


def test_what_cannot_be_read_does_not_stop_the_rest(digits_run, folder, tmp_path):
    (tmp_path / "cut.png").write_bytes((folder / "7.png").read_bytes()[:80])
    (tmp_path / "empty").mkdir()
    unreadable = [folder / "notes.txt", *(tmp_path / name for name in ("cut.png", "nowhere.png", "empty", 300 * "x"))]
    done = predict(digits_run, *unreadable, folder / "3.png", status=1)
    assert done.stdout.startswith(f"{folder / '3.png'}: 3 (") and done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(unreadable)
    messages = ("is no PNG", "is cut off or damaged", "does not exist", "holds no image", "File name too long")
    for line, path, message in zip(lines, unreadable, messages, strict=True):
        assert line.startswith(f"error: {path} ") and message in line


def test_below_the_threshold_is_a_question_mark(digits_run, folder):
    out = predict(digits_run, folder / "7.png", "--threshold=1").stdout
    assert "7.png: ? (likeliest 7, " in out


def test_json_says_where_and_how_sure(digits_run, folder, split, tmp_path):
    form = form_generator.draw(split, np.random.default_rng(0), paper="plain", lines=2, numbers=2)
    path = tmp_path / "form.tif"
    Image.fromarray(form.image).save(path)
    done = predict(digits_run, path, folder / "notes.txt", "--layout=page", "--json", status=1)
    read, failed = map(json.loads, done.stdout.splitlines())
    assert failed["file"] == str(folder / "notes.txt") and "is no PNG" in failed["error"]
    assert read["file"] == str(path) and read["layout"] == "page"
    assert read["text"] == "\n".join(line["text"] for line in read["lines"])
    digits = [digit for line in read["lines"] for number in line["numbers"] for digit in number["digits"]]
    assert len(digits) == len(form.boxes)
    for digit, box in zip(digits, form.boxes, strict=True):
        assert np.abs(np.array(digit["box"]) - box).max() < 6
        assert sum(digit["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert digit["confidence"] == max(digit["probabilities"]) == digit["probabilities"][digit["likeliest"]]
        assert digit["digit"] in (None, digit["likeliest"])


def test_annotated_copies(digits_run, folder, split, tmp_path):
    form = form_generator.draw(split, np.random.default_rng(0), paper="ruled", lines=2, numbers=2)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        Image.fromarray(form.image).save(tmp_path / place / "form.png")
    output = tmp_path / "new" / "copies"
    predict(digits_run, tmp_path / "a", tmp_path / "b", "--layout=page", f"--annotate={output}")
    assert sorted(path.name for path in output.iterdir()) == ["form.2.png", "form.png"]  # neither overwrites the other
    copy = np.asarray(Image.open(output / "form.png")).astype(int)
    assert copy.shape == (*form.image.shape, 3)
    left, top, right, bottom = form.boxes[0].astype(int)
    around = copy[top - 6 : bottom + 6, left - 6 : right + 6]
    assert (np.ptp(around, axis=2) > 80).sum() > bottom - top  # a box in colour


@pytest.mark.parametrize("way", ["file", "directory", "list", "link"])
def test_annotated_copies_never_overwrite_what_is_read(way, digits_run, folder, tmp_path):
    other = shutil.copy(folder / "7.png", tmp_path / "3.png")  # its copy would be the 3.png of the folder
    pictures = shutil.copytree(folder, tmp_path / "pictures")
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    link = tmp_path / "link.png"
    link.symlink_to(pictures / "3.png")
    arguments = {"file": [pictures / "3.png"], "directory": [pictures], "list": ["-"], "link": [link]}[way]
    done = subprocess.run(
        [sys.executable, "-m", "mnist_flax.predict", digits_run, other, *arguments, f"--annotate={pictures}"],
        input=f"{pictures / '3.png'}\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "which is to be read: name another directory" in done.stderr
    assert {path.name: path.read_bytes() for path in pictures.iterdir()} == before


def test_annotated_copies_are_written_anew_and_through_no_link(digits_run, folder, tmp_path):
    (tmp_path / "3.png").symlink_to(folder / "3.png")
    before = (folder / "3.png").read_bytes()
    for _ in range(2):
        predict(digits_run, folder, f"--annotate={tmp_path}")
    assert (folder / "3.png").read_bytes() == before
    assert np.asarray(Image.open(tmp_path / "3.png")).shape == (300, 300, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "name a run directory and images"),
        (["{run}", ""], "an argument is empty"),
        (["{run}", "x.png", "--annotate="], "--annotate= names nothing"),
        (["{nowhere}", "x.png"], "is no run directory"),
        (["{run}", "x.png", "--layout=book"], "layout"),
        (["{run}", "x.png", "--threshold=2"], "threshold"),
        (["{run}", "x.png", "--threshold=nan"], "--threshold=nan"),
        (["{run}", "x.png", "--annotate={file}"], "cannot be made"),
        (["{run}", "x.png", "--anotate={file}"], "anotate"),
    ],
)
def test_wrong_inputs_get_one_line(arguments, message, digits_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = {"run": digits_run, "nowhere": tmp_path / "nowhere", "file": tmp_path / "file"}
    assert message in refusal("mnist_flax.predict", *(argument.format(**places) for argument in arguments))
