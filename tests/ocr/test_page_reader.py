"""Reading of forms that are drawn from real digits; see `experiments/forms.py` for the figures of the reference run."""

import numpy as np
import pytest

from mnist_flax.data import datasets
from mnist_flax.experiments import forms
from mnist_flax.experiments.benchmarks import form_generator
from mnist_flax.inference import classifier
from mnist_flax.inference.run import load_run
from mnist_flax.ocr import page_reader
from mnist_flax.runtime import run_dir

PERFECT = -1e-6  # log probability


@pytest.fixture(scope="module")
def reader(mnist_run):
    return classifier.load_classifier(load_run(mnist_run))


@pytest.fixture(scope="module")
def digits(mnist_run):
    return datasets.load(run_dir.read_config(mnist_run)).test


def read_forms(reader, digits, style, papers=form_generator.PAPERS, count: int = 3) -> forms.Score:
    scores = []
    for kind, paper in enumerate(papers):
        for i in range(count):
            form = form_generator.draw(digits, np.random.default_rng([kind, i]), style, paper, inverted=i % 4 == 2)
            grey = form.image.astype(np.float32) / 255
            (result,) = page_reader.read([grey], "page", reader.log_probabilities, 0.0)
            scores.append(forms.score(form, result))
    return forms.total(scores)


@pytest.mark.parametrize(
    ("style", "digits_read", "numbers_read"),
    [(form_generator.CLEAN, 0.93, 0.8), (form_generator.DEGRADED, 0.9, 0.7), (form_generator.JOINED, 0.6, 0.4)],
    ids=["clean", "degraded", "joined"],
)
def test_forms_are_read(reader, digits, style, digits_read, numbers_read):
    """A small network, which reads 98 % of the test split; every answer counts, none is `?`."""
    papers = ("plain",) if style is form_generator.JOINED else form_generator.PAPERS
    score = read_forms(reader, digits, style, papers, count=6 if style is form_generator.JOINED else 3)
    assert score.read / score.digits >= digits_read, score
    assert score.numbers_read / score.numbers >= numbers_read, score
    if style is not form_generator.JOINED:
        assert score.missed <= 0.02 * score.digits and score.extra <= 0.03 * score.digits, score


def some_digits() -> form_generator.Digits:
    """Shapes that stand for digits, where what they say does not matter."""
    rows, columns = np.mgrid[:28, :28]
    radius = np.hypot((rows - 13.5) / 1.3, columns - 13.5)
    return np.where(abs(radius - 6) < 1.4, 255, 0).astype(np.uint8)[None], np.zeros(1, int)


@pytest.mark.parametrize("paper", form_generator.PAPERS)
@pytest.mark.parametrize("style", [form_generator.CLEAN, form_generator.DEGRADED], ids=["clean", "degraded"])
def test_lines_and_numbers_are_put_together(paper, style):
    for seed in range(3):
        form = form_generator.draw(some_digits(), np.random.default_rng(seed), style, paper, inverted=seed == 1)

        def rings(images):
            scores = np.full((len(images), 10), -20.0)
            scores[:, 0] = PERFECT
            return scores

        (result,) = page_reader.read([form.image.astype(np.float32) / 255], "page", rings, 0.5)
        assert result.text == "\n".join(" ".join(line) for line in form.lines), (seed, paper)


def test_a_line_is_one_line_however_it_slopes(reader, digits):
    form = form_generator.draw(digits, np.random.default_rng(4), form_generator.Style(tilt=4.0), lines=1, numbers=3)
    (result,) = page_reader.read([form.image.astype(np.float32) / 255], "line", reader.log_probabilities, 0.0)
    assert len(result.lines) == 1 and len(result.digits) == len(form.boxes)


def test_nothing_is_found_on_empty_paper():
    def recognise(images):
        raise AssertionError("there is nothing to recognise")

    rng = np.random.default_rng(0)
    for paper in (np.ones((200, 300)), np.zeros((50, 60)), 0.8 + 0.02 * rng.normal(size=(200, 300)), np.ones((1, 1))):
        for kind in page_reader.LAYOUTS:
            (result,) = page_reader.read([paper.astype(np.float32)], kind, recognise, 0.5)
            assert result.text == "" and not result.digits


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2), (5, 4000)])
def test_strange_shapes_are_no_trouble(shape):
    rng = np.random.default_rng(1)
    for kind in page_reader.LAYOUTS:
        picture = rng.random(shape, np.float32)
        page_reader.read([picture], kind, lambda images: np.log(np.full((len(images), 10), 0.1)), 0.5)
