"""Reading of forms that are drawn from real digits; see `experiments/forms.py` for the figures of the reference run."""

import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.data import datasets
from mnist_flax.experiments import forms
from mnist_flax.experiments.benchmarks import form_generator
from mnist_flax.inference import classifier
from mnist_flax.inference.run import load_run
from mnist_flax.ocr import binarize, page_reader, reading_order, ruled_lines, segment
from mnist_flax.runtime import run_dir
from tests.commands import command

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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("validation_examples", 0, "has no validation examples: choose another --split"),
        ("dataset", "kmnist", "was trained on kmnist, not on digits"),
    ],
)
def test_runs_that_no_forms_can_be_drawn_for_get_one_line(field, value, message, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    recorded = run_dir.read_json(digits_run / "config.json")
    recorded["config"] |= {field: value, "data_dir": str(tmp_path / "data")}
    run_dir.write_json(tmp_path / "run" / "config.json", recorded)
    error = command("experiments.forms", tmp_path / "run", "--split=validation", status=2).stderr
    assert message in error and "download" not in error


def overlap(a, b) -> float:
    """The common part of two boxes (left, top, right, bottom), as a share of their union."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    area, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (area + other - common)


BOX = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), *[st.integers(0, 6)] * 2, *[st.integers(3, 8)] * 2)


@settings(deadline=None)  # the first call imports SciPy
@given(st.lists(BOX, max_size=4), st.lists(BOX, max_size=4))
def test_boxes_are_matched_as_well_as_they_can_be(true, found):
    """Against every way of matching them; so the order, in which either are given, makes no difference."""
    chosen = forms.matches(*(np.array(boxes).reshape(-1, 4) for boxes in (true, found)))
    pairs = [(i, j) for i, j in enumerate(chosen) if j >= 0]
    assert len(chosen) == len(true) and len({j for _, j in pairs}) == len(pairs)
    assert all(overlap(true[i], found[j]) > 0.4 for i, j in pairs)

    def total(pairs) -> float:
        shares = [overlap(true[i], found[j]) for i, j in pairs if j < len(found)]
        return sum(share for share in shares if share > 0.4)

    places = range(len(found) + len(true))  # those beyond the boxes that were found are none
    best = max(total(enumerate(each)) for each in itertools.permutations(places, len(true)))
    assert total(pairs) == pytest.approx(best)


def test_a_digit_that_was_not_found_takes_no_box_of_another():
    assert forms.matches(np.array([[0, 0, 10, 10], [20, 0, 30, 10]]), np.array([[20, 0, 30, 10]])) == [-1, 0]


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


def test_shadows_do_not_matter():
    grey = np.full((200, 300), 0.9, np.float32)
    grey[60:140, 100:110] = grey[60:140, 180:190] = 0.2
    lit = binarize.find_ink(grey).mask
    shaded = binarize.find_ink(grey * np.linspace(1, 0.35, 300, dtype=np.float32)).mask
    inverted = binarize.find_ink(1 - grey).mask
    assert lit[60:140, 100:110].mean() > 0.95 and lit.sum() < 2_200
    assert np.mean(lit != shaded) < 0.01 and np.mean(lit != inverted) < 0.01


@pytest.mark.parametrize("degrees", [-3.0, 0.0, 2.0])
def test_the_tilt_is_found(degrees):
    rows, columns = np.mgrid[:300, :500]
    mask = (np.rint(rows - columns * np.tan(np.deg2rad(degrees))) % 60 < 8) & (columns % 30 < 12)
    assert ruled_lines.tilt(mask) == pytest.approx(degrees, abs=0.2)


def test_rules_go_and_strokes_that_cross_them_stay():
    share = np.zeros((120, 400), np.float32)
    share[60:62] = share[:, 200:202] = 1
    share[30:90, 100:108] = share[30:90, 300:308] = 1
    found, vertical = ruled_lines.remove_rules(binarize.Ink(share, share > 0, share > 0), 60)
    assert not found.mask[:, 120:290].any() and vertical[:, 200:202].all()
    assert found.mask[30:90, 100:108].all() and found.mask[30:90, 300:308].all()


def test_rules_that_a_stroke_joins_go_too():
    share = np.zeros((400, 120), np.float32)
    share[:, 40:42] = share[:, 64:66] = 1
    rows = np.arange(200, 240)
    for row in rows:  # a stem from one to the other
        share[row, 64 - (row - 200) * 24 // 40 - 3 : 64 - (row - 200) * 24 // 40 + 4] = 1
    found, vertical = ruled_lines.remove_rules(binarize.Ink(share, share > 0, share > 0), 40)
    assert vertical[:, 40:42].mean() > 0.95 and vertical[:, 64:66].mean() > 0.95
    assert found.mask[205:235].any() and not found.mask[:190].any()


def test_the_cheapest_path_is_that_of_least_cost():
    """Against every path, tried one by one."""
    rng = np.random.default_rng(0)
    image = np.zeros((28, 28), np.uint8)
    for _ in range(50):
        count = int(rng.integers(1, 6))
        spans = [
            segment.Span(first, stop, (0, 0, int(rng.integers(5, 60)), 40), image, float(rng.integers(0, 3)), 1)
            for first in range(count)
            for stop in range(first + 1, min(count, first + 3) + 1)
        ]
        scores = -rng.exponential(0.5, len(spans))

        def cost(path, spans=spans, scores=scores) -> float:
            return sum(-segment.DOUBT * scores[i] + segment.penalty(spans[i], 40) for i in path)

        def paths(place, spans=spans, count=count):
            if place == count:
                yield []
            for i, span in enumerate(spans):
                if span.first == place:
                    yield from ([i, *rest] for rest in paths(span.stop))

        best = segment.best_path(spans, scores, 40)
        assert cost(best) == pytest.approx(min(map(cost, paths(0))))


def comb(left: int, count: int) -> tuple[list[segment.Box], list[int]]:
    """Digits in boxes 60 wide from `left` on, and the rules around them."""
    return [(left + 60 * i + 10, 10, left + 60 * i + 45, 50) for i in range(count)], [
        left + 60 * i for i in range(count + 1)
    ]


def test_numbers_in_boxes_end_where_boxes_do():
    separators = np.zeros((60, 1000), bool)
    first, second, third = comb(10, 3), comb(230, 1), comb(330, 2)
    for _, columns in (first, second, third):
        separators[5:55, columns] = True
    boxes = first[0] + second[0] + third[0]
    assert reading_order.number_breaks([boxes], 40, separators) == [[False, False, True, True, False]]


def test_numbers_on_plain_paper_end_at_wide_gaps():
    boxes = [(left, 0, left + 25, 40) for left in (0, 32, 64, 130, 162)]
    assert reading_order.number_breaks([boxes, boxes[:1], []], 40, np.zeros((60, 400), bool)) == [
        [False, False, True, False],
        [],
        [],
    ]
