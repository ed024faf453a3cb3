import gzip
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.experiments import hardest
from mnist_flax.inference import classifier
from mnist_flax.inference.predictor import make_logits
from mnist_flax.inference.run import load_run
from tests.commands import command, refusal


def test_images_that_most_runs_read_wrong_come_most_often_wrong_first():
    images = np.arange(5 * 784, dtype=np.uint8).reshape(5, 28, 28)
    labels = np.array([1, 2, 3, 4, 5])
    predictions = np.array([[1, 0, 7, 4, 5], [1, 2, 7, 9, 5], [1, 0, 3, 9, 5], [0, 0, 7, 9, 6], [1, 2, 7, 9, 6]])
    found = hardest.find(images, labels, predictions)
    assert [item.number for item in found] == [2, 3, 1]
    assert [item.votes for item in found] == [{7: 4, 3: 1}, {9: 4, 4: 1}, {0: 3, 2: 2}]
    assert [item.label for item in found] == [3, 4, 2]
    np.testing.assert_array_equal(found[0].image, images[2])


def test_half_of_the_runs_are_not_most():
    images, labels = np.zeros((1, 28, 28), np.uint8), np.array([3])
    assert not hardest.find(images, labels, np.array([[3], [5]]))
    assert len(hardest.find(images, labels, np.array([[3], [5], [5]]))) == 1


def test_known_label_errors_are_the_images_of_the_original_archive(mnist_archives):
    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((mnist_archives / name).read_bytes()), np.uint8, offset=header)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read("t10k-labels-idx1-ubyte.gz", 8)
    order = np.random.default_rng(0).permutation(len(images))
    found = hardest.find(images[order], labels[order].astype(int), (labels[order, None].T + 1) % 10)
    errors = {int(order[item.number]): item for item in found if item.label_error}
    assert len(errors) == len(hardest.LABEL_ERRORS) == 15
    for number, item in errors.items():
        error = item.label_error
        assert error.number == number and error.guess != labels[number] == item.label
        assert error.for_label + error.for_guess + error.for_neither == 5 and error.for_label <= 2


@pytest.mark.parametrize("dataset", datasets.CLASS_NAMES)
def test_no_text_of_the_figure_touches_another(dataset):
    names = datasets.CLASS_NAMES[dataset]
    error = hardest.LabelError(0, 6, 2, 2, 1) if names == classifier.DIGITS else None
    image = np.zeros((28, 28), np.uint8)
    hard = [hardest.Hard(9990 + i, i, {(i + k) % 10: 12 - k for k in range(1, 5)}, error, image) for i in range(10)]
    figure = hardest.figure_hardest(hard, 40, 42, names)
    figure.canvas.draw()
    texts = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(texts, 2))
    assert all(text.x0 >= 0 and text.x1 <= figure.bbox.x1 for text in texts)
    assert any("In blue" in text.get_text() for text in figure.axes[0].texts) == bool(error)


def test_command_draws_and_writes(digits_run, tmp_path):
    place = tmp_path / "new" / "place"
    out = command("experiments.hardest", digits_run, f"--output={place}", "--most=2").stdout
    assert out.splitlines()[-1] == f"written: {place / 'hardest.png'} and {place / 'hardest.json'}"
    written = json.loads((place / "hardest.json").read_text())
    trained = load_run(digits_run)
    images, labels = datasets.load(trained.config).test
    wrong = np.flatnonzero(make_logits(trained)(images).argmax(axis=1) != labels)
    assert [item["number"] for item in written["hardest"]] == wrong.tolist() and len(wrong) > 2
    assert f"{len(wrong)} test images" in out
    assert all(sum(item["votes"].values()) == 1 for item in written["hardest"])
    assert Image.open(place / "hardest.png").width > 900


def test_command_refuses_in_one_line(digits_run, tmp_path):
    (tmp_path / "a" / "hardest.json").mkdir(parents=True)
    (tmp_path / "file").touch()
    places = (tmp_path / "a", tmp_path / "file", tmp_path / "file" / "b")
    twice = [digits_run, f"{digits_run}/"]
    for arguments in ([], [tmp_path], twice, *([digits_run, f"--output={path}"] for path in places)):
        refusal("experiments.hardest", *arguments)
