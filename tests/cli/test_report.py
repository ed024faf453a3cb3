import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_flax.evaluation import metrics, report
from mnist_flax.runtime import run_dir, terminal
from mnist_flax.runtime.cli import UserError
from mnist_flax.runtime.metrics_log import read_records
from tests.commands import command, refusal

NASTY = "<script>alert('x')</script>&amp;\"<img src=//evil.example/x>"
FIGURES = {"learning_curves", "confusion_matrix", "filters", "mistakes", "reliability"}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def make_run(directory: Path, epochs: int = 2) -> Path:
    directory.mkdir(parents=True)
    rows = [
        {"step": 10 * epoch, "epoch": epoch, "split": split, "loss": 1 / epoch, "accuracy": 1 - 0.1 / epoch}
        | {"learning_rate": 1e-3, "images_per_second": 1e4 if split == "train" else None, "seconds": 1.5}
        for epoch in range(1, epochs + 1)
        for split in ("train", "validation")
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorded = {"config": {"seed": 3, "model": {"channels": [32, 64], "head": NASTY}}, "versions": {"jax": "0.10.2"}}
    (directory / "config.json").write_text(json.dumps(recorded))
    return directory


def write(directory: Path, summary: dict | None = None, class_names=tuple("0123456789")) -> Page:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    logits = rng.normal(size=(400, 10)).astype(np.float32)
    logits[np.arange(400), labels] += 4
    logits[:8] = -logits[:8]
    summary = summary or {"dataset": "digits", "parameters": 421_642, "train_seconds": 131.4, "device": "1 x cpu"}
    images = rng.integers(0, 256, (400, 28, 28), dtype=np.uint8)
    kernel = rng.normal(size=(3, 3, 1, 32)).astype(np.float32)
    pictures = report.draw(directory, images, labels, logits, kernel, class_names)
    path = report.write(directory, summary, metrics.evaluate_logits(logits, labels), class_names, pictures)
    assert path == directory / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    page.errors = int((logits.argmax(1) != labels).sum())
    return page


def test_writes_figures_and_one_page_that_holds_them(tmp_path):
    page = write(make_run(tmp_path / "run"))
    images = {}
    for tag, attributes in page.tags:
        if tag == "figure":
            name = attributes["id"]
        if tag == "img":
            assert attributes["alt"]
            images[name] = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
    assert images.keys() == FIGURES
    for name, content in images.items():
        assert (tmp_path / "run" / "figures" / f"{name}.png").read_bytes() == content
        assert Image.open(io.BytesIO(content)).width >= 900


def test_page_shows_robustness_where_it_was_measured(tmp_path):
    directory = make_run(tmp_path / "run")
    (directory / "figures").mkdir()
    (directory / "figures" / "affine.png").write_bytes(b"drawn before")
    page = write(directory)
    assert {attributes["id"] for tag, attributes in page.tags if tag == "figure"} == FIGURES | {"affine"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert base64.b64decode(sources[-1].removeprefix("data:image/png;base64,")) == b"drawn before"


def test_page_says_what_was_measured(tmp_path):
    page = write(make_run(tmp_path / "run"))
    accuracy = f"{100 * (400 - page.errors) / 400:.2f} %"
    assert f"{accuracy} right on the digits test set" in page.text
    for text in (accuracy, str(page.errors), "421,642", "2 min 11 s", "model.channels", "[32, 64]", "versions.jax"):
        assert text in page.text, text
    assert page.open == []


def test_page_needs_nothing_from_outside(tmp_path):
    page = write(make_run(tmp_path / "run"))
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    html = (tmp_path / "run" / "report.html").read_text()
    assert "@import" not in html and "url(" not in html
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert {"script", "iframe", "object", "link"}.isdisjoint(tag for tag, _ in page.tags)


def test_everything_shown_is_escaped(tmp_path):
    directory = make_run(tmp_path / "<b>run")
    summary = {"dataset": NASTY, "parameters": 1, "device": NASTY, NASTY: NASTY}
    page = write(directory, summary, (NASTY, *"123456789"))
    ours = {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "code", "main", "dl", "div", "dt"}
    ours |= {"dd", "b", "small", "figure", "img", "figcaption", "section", "h2", "table", "thead", "tbody", "tr"}
    assert {tag for tag, _ in page.tags} <= ours | {"th", "td"}
    assert sum(tag == "img" for tag, _ in page.tags) == len(FIGURES)
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Its tile has the device; tables have the class, the config value, and the summary's dataset, device and field.
    assert page.text.count(NASTY) == 7
    assert "<b>run" in page.text


def test_fields_that_are_missing_or_null_are_shown_as_such(tmp_path):
    page = write(make_run(tmp_path / "run"), {"validation_accuracy": None, "images_per_second": 12_944.4})
    assert "none" in page.text and "12,944" in page.text
    assert any("right on the unknown test set" in text for text in page.text)


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("test_accuracy", 0.9953, "99.53 %"),
        ("validation_accuracy", None, "none"),
        ("train_seconds", 59.94, "59.9 s"),
        ("train_seconds", 59.96, "1 min 0 s"),
        ("train_seconds", float("nan"), "NaN"),
        ("total_seconds", 119.7, "2 min 0 s"),
        ("total_seconds", 3_725.0, "62 min 5 s"),
        ("parameters", 1_199_882, "1,199,882"),
        ("test_loss", 0.01523, "0.0152"),
        ("images_per_second", 12_944.4, "12,944"),
        ("dataset", "mnist", "mnist"),
        ("flag", True, "true"),
    ],
)
def test_fields_of_the_summary_as_people_write_them(name, value, want):
    assert terminal.shown(name, value) == want


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    whole = read_records(path)
    assert [(row["epoch"], row["split"]) for row in whole] == [(e, s) for e in (1, 2) for s in ("train", "validation")]
    content = path.read_text()
    for length in range(len(content) - 60, len(content)):
        path.write_text(content[:length])
        assert read_records(path) == whole[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no record yet"),
        ('{"split": "train"', "has no record yet"),
        ("nonsense\n", "line 1 is damaged"),
        ("[]\n", "line 1 is damaged"),
        ('{"split": "train", "epoch": 1, "loss": "x", "accuracy": 1, "learning_rate": 1}\n', "line 1 is damaged"),
        ('{"split": "test", "epoch": 1, "loss": 1, "accuracy": 1, "learning_rate": 1}\n', "line 1 is damaged"),
    ],
)
def test_damaged_records_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_records(path)
    assert "\n" not in str(error.value)


def test_missing_or_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "metrics.jsonl")
    (tmp_path / "config.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="cannot be read"):
        run_dir.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="does not describe a run"):
        run_dir.read_config(tmp_path)


def test_command_refuses_what_is_no_finished_run(tmp_path):
    make_run(tmp_path / "run")
    for arguments in ([], ["a", "b"], [tmp_path / "missing"], [tmp_path], [tmp_path / "run"]):
        refusal("mnist_flax.report", *arguments)


def test_command_draws_a_finished_run_again(tmp_path, digits_data_dir):
    workdir = tmp_path / "run"
    small = ("--config.model.channels=(4,)", "--config.model.dense=()", "--config.num_epochs=1")
    place = (f"--config.data_dir={digits_data_dir}", f"--workdir={workdir}")
    command("mnist_flax.main", "--config=configs/digits.py", *small, *place)
    first = {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}
    assert first.keys() == {f"{name}.png" for name in FIGURES}
    shutil.rmtree(workdir / "figures")
    (workdir / "report.html").unlink()

    out = command("mnist_flax.report", workdir).stdout
    assert out == f"written: {workdir / 'report.html'}\n"
    for name, content in first.items():
        assert (workdir / "figures" / name).read_bytes() == content, name
    summary = json.loads((workdir / "summary.json").read_text())
    page = Page((workdir / "report.html").read_text())
    assert f"{100 * summary['test_accuracy']:.2f} % right on the digits test set" in page.text

    (workdir / "summary.json").unlink()
    assert "is not finished" in refusal("mnist_flax.report", workdir)
