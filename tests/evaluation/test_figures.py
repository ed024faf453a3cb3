import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnist_flax.evaluation import figures, metrics

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def record(epoch: int, split: str, loss: float, accuracy: float) -> dict:
    return {"epoch": epoch, "split": split, "loss": loss, "accuracy": accuracy, "learning_rate": 1e-3 / epoch}


def curves(*validation: tuple[float, float]) -> list[dict]:
    rows = []
    for epoch, (loss, accuracy) in enumerate(validation, start=1):
        rows += [record(epoch, "train", 2 * loss, accuracy - 0.01), record(epoch, "validation", loss, accuracy)]
    return rows


def predictions(n: int = 200, seed: int = 0, skill: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    logits = rng.normal(size=(n, 10)).astype(np.float32)
    logits[np.arange(n), labels] += skill
    return rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), labels, logits


def render(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def drawn_boxes(figure, texts) -> list:
    """Places of texts on the canvas, after layout."""
    render(figure)
    return [text.get_window_extent() for text in texts]


def overlap(a, b) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def test_learning_curves_show_what_was_recorded():
    figure = figures.figure_learning_curves(curves((0.5, 0.9), (0.2, 0.95), (0.3, 0.94)))
    loss, error, rate = figure.axes
    np.testing.assert_allclose([line.get_ydata() for line in loss.lines], [[1.0, 0.4, 0.6], [0.5, 0.2, 0.3]])
    np.testing.assert_allclose([line.get_ydata() for line in error.lines[:2]], [[11, 6, 7], [10, 5, 6]])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [1e-3, 5e-4, 1e-3 / 3])
    assert [text.get_text() for text in loss.texts] == ["train\n0.6000", "validation\n0.3000"]
    assert error.get_title("right") == "lowest validation error: 5.00 %, epoch 2"
    assert error.lines[2].get_xydata().tolist() == [[2, pytest.approx(5)]]
    low, high = error.get_ylim()
    assert low < 5 and high > 11


@pytest.mark.parametrize("end", [(0.2, 0.99), (0.1, 0.9901), (1e-4, 0.9999)])
def test_labels_of_curves_that_end_together_do_not_overlap(end):
    rows = [record(1, "train", 1.0, 0.8), record(1, "validation", 0.9, 0.9)]
    rows += [record(2, "train", 0.1, 0.99), record(2, "validation", *end)]
    figure = figures.figure_learning_curves(rows)
    for axes in figure.axes[:2]:
        boxes = drawn_boxes(figure, axes.texts)
        assert len(boxes) == 2 and not overlap(*boxes)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_a_perfect_epoch_has_its_place_on_the_axis():
    figure = figures.figure_learning_curves(curves((0.5, 0.9), (0.01, 1.0)))
    error = figure.axes[1]
    assert 0 in error.get_yticks() and error.get_ylim()[0] < 0
    render(figure)
    assert error.get_yticklabels()[0].get_text() == "0 %"


@pytest.mark.parametrize("rows", [curves((0.5, 0.9)), [record(1, "train", 0.3, 0.9)], [record(1, "train", 0.0, 1.0)]])
def test_one_epoch_and_no_validation_are_drawn(rows):
    figure = figures.figure_learning_curves(rows)
    assert len(figure.axes[0].lines) == len(rows)
    assert render(figure).width > 600


def test_confusion_shows_every_count_and_darkens_mistakes_only():
    _, labels, logits = predictions(skill=1.0)
    confusion = metrics.confusion_matrix(logits, labels)
    axes = figures.figure_confusion(confusion, DIGITS).axes[0]
    cells = {
        (round(text.get_position()[1]), round(text.get_position()[0])): int(text.get_text())
        for text in axes.texts
        if text.get_position()[0] <= 9 and text.get_position()[1] >= 0
    }
    assert cells == {(i, j): confusion[i, j] for i in range(10) for j in range(10) if confusion[i, j]}
    errors = confusion.sum() - np.trace(confusion)
    assert axes.get_title("left") == f"{errors} of 200 wrong ({errors / 2:.2f} %)"
    shades = axes.images[0].get_array()
    assert shades.mask[np.diag_indices(10)].all()
    order = np.argsort(shades[~shades.mask])
    assert (np.diff(confusion[~shades.mask][order]) >= 0).all()
    recalls = [text.get_text() for text in axes.texts if text.get_text().endswith("%")]
    assert recalls == [f"{100 * x:.1f} %" for x in np.diag(confusion) / confusion.sum(1)]


def test_confusion_of_a_class_without_examples():
    confusion = np.diag([5, 0, 3])
    axes = figures.figure_confusion(confusion, ("a", "b", "c")).axes[0]
    assert "none" in [text.get_text() for text in axes.texts]


def test_mistakes_are_the_most_confident_ones_in_order():
    images, labels, logits = predictions(skill=0.5)
    figure = figures.figure_mistakes(images, labels, logits, DIGITS)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    wrong = [i for i in range(200) if logits[i].argmax() != labels[i]]
    want = sorted(wrong, key=lambda i: -probabilities[i].max())[:30]
    assert len(wrong) > 30
    (axes,) = figure.axes
    title, *texts = [text.get_text() for text in axes.texts]
    assert title == f"Mistakes: the 30 most confident of {len(wrong)}"
    assert len(axes.images) == 30 and len(texts) == 90
    for k, i in enumerate(want):
        np.testing.assert_array_equal(axes.images[k].get_array(), images[i])
        read = f"read {logits[i].argmax()}, {100 * probabilities[i].max():.0f} %"
        assert texts[3 * k : 3 * k + 3] == [str(labels[i]), f"#{i}", read]


def test_few_mistakes_and_none():
    images, labels, logits = predictions(40, skill=2.0)
    wrong = (logits.argmax(1) != labels).sum()
    assert 0 < wrong <= 30
    axes = figures.figure_mistakes(images, labels, logits, DIGITS).axes[0]
    assert axes.texts[0].get_text() == f"Mistakes: all {wrong}" and len(axes.images) == wrong
    perfect = figures.figure_mistakes(images, logits.argmax(1), logits, DIGITS)
    texts = [text.get_text() for text in perfect.axes[0].texts]
    assert texts == ["Mistakes: none", "No mistake among 40 examples."]
    render(perfect)


@pytest.mark.parametrize("names", [DIGITS, CLOTHES])
def test_texts_of_mistakes_do_not_overlap(names):
    images, labels, logits = predictions(20_000, skill=1.5)
    figure = figures.figure_mistakes(images, labels, logits, names)
    boxes = drawn_boxes(figure, figure.axes[0].texts)
    boxes += [image.get_window_extent() for image in figure.axes[0].images]
    assert len(boxes) == 1 + 4 * 30
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 for box in boxes)
    assert not any(overlap(a, b) for k, a in enumerate(boxes) for b in boxes[:k])


@pytest.mark.parametrize(("size", "channels"), [(3, 32), (7, 6), (5, 1), (2, 176)])
def test_filters_are_all_there_strongest_first(size, channels):
    kernel = np.random.default_rng(0).normal(size=(size, size, 1, channels)).astype(np.float32)
    figure = figures.figure_filters(kernel)
    sheet = figure.axes[0].images[0].get_array().filled(np.nan)
    step = size + 1
    found = [
        sheet[y : y + size, x : x + size]
        for y in range(0, sheet.shape[0], step)
        for x in range(0, sheet.shape[1], step)
    ]
    found = [values for values in found if not np.isnan(values).any()]
    want = sorted((kernel[:, :, 0, c] for c in range(channels)), key=lambda values: -np.square(values).sum())
    np.testing.assert_allclose(found, want, rtol=1e-6)
    low, high = figure.axes[0].images[0].get_clim()
    assert high == -low == pytest.approx(np.abs(kernel).max())


def test_reliability_draws_the_bins():
    _, labels, logits = predictions(2_000, skill=2.0)
    bins = metrics.reliability_bins(logits, labels)
    figure = figures.figure_reliability(bins)
    diagram, histogram = figure.axes
    full = bins["count"] > 0
    bars, gaps = (container for container in diagram.containers if hasattr(container, "patches"))
    np.testing.assert_allclose([bar.get_height() for bar in bars], bins["accuracy"][full])
    tops = [bar.get_y() + bar.get_height() for bar in gaps]
    np.testing.assert_allclose(tops, bins["confidence"][full])
    assert [bar.get_height() for bar in histogram.patches] == bins["count"][full].tolist()
    assert diagram.get_title("left") == f"Expected calibration error {100 * metrics.calibration_error(bins):.2f} %"
    segments = diagram.collections[0].get_segments()
    for (bottom, top), share, n in zip(segments, bins["accuracy"][full], bins["count"][full], strict=True):
        assert (bottom[1], top[1]) == pytest.approx(metrics.wilson_interval(round(share * n), int(n)))
    render(figure)


def test_drawing_leaves_the_readers_settings_alone_and_ignores_them():
    plain = render(figures.figure_filters(np.ones((3, 3, 1, 4)))).size
    with matplotlib.rc_context({"font.size": 31, "figure.dpi": 50, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        assert render(figures.figure_filters(np.ones((3, 3, 1, 4)))).size == plain
        assert dict(matplotlib.rcParams) == before


def test_import_is_light_and_pyplot_never_needed():
    code = """
import sys
import numpy as np
from mnist_flax.evaluation import figures, report
assert "matplotlib" not in sys.modules
figures.figure_confusion(np.eye(3, dtype=int), "abc").savefig("/dev/null", format="png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
