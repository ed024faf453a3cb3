import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mnist_flax.data import datasets
from mnist_flax.evaluation import corruptions, robustness
from mnist_flax.evaluation.corruptions import FAMILIES, SEVERITIES
from mnist_flax.inference.predictor import make_logits
from mnist_flax.inference.run import load_run
from tests.commands import command


def some_digits(count: int = 30, seed: int = 0) -> datasets.Split:
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 8:20, 8:20] = rng.integers(0, 256, (count, 12, 12))
    return datasets.Split(images, rng.integers(0, 10, count).astype(np.int32))


def by_brightness(images: np.ndarray) -> np.ndarray:
    """A model of a kind: the class is the mean of the pixels."""
    return -np.abs(images.mean(axis=(1, 2))[:, None] / 8 - np.arange(10)) * 3


@pytest.fixture(scope="module")
def measured():
    split = some_digits()
    return split, robustness.measure(by_brightness, split)


def test_every_accuracy_is_that_of_its_variant(measured):
    split, found = measured
    np.testing.assert_array_equal(found.clean, by_brightness(split.images))
    assert found.corrupted.keys() == found.published.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        logits = [by_brightness(corruptions.corrupt(split.images, name, severity)) for severity in SEVERITIES]
        assert found.corrupted[name] == [np.mean(x.argmax(axis=1) == split.labels) for x in logits]
        np.testing.assert_array_equal(found.published[name], logits[family.published - 1])
    for name, direction in robustness.AFFINE.items():
        assert len(found.affine[name]) == len(direction.values)
        unmoved = direction.values.index(1 if name == "scale" else 0)
        assert found.affine[name][unmoved] == np.mean(found.clean.argmax(axis=1) == split.labels)
    right, down = (robustness.AFFINE[f"shift_{name}"].inverse(4) for name in ("right", "down"))
    for move, axis in ((right, 2), (down, 1)):
        moved = corruptions.affine(split.images / 255, *move)
        np.testing.assert_allclose(moved, np.roll(split.images, 4, axis) / 255)


def test_large_splits_are_read_in_parts_that_do_not_matter(monkeypatch, measured):
    split, whole = measured
    monkeypatch.setattr(robustness, "_AT_ONCE", 11)
    parts = robustness.measure(by_brightness, split)
    assert parts.corrupted == whole.corrupted and parts.affine == whole.affine


def test_summary_adds_up(measured):
    split, found = measured
    results = json.loads(json.dumps(robustness.summarize(found, split.labels, 2.0)))
    published = [row["accuracy"][row["published_severity"] - 1] for row in results["corruptions"].values()]
    assert results["corrupted_accuracy"] == pytest.approx(np.mean(published))
    for name, accuracy in (("clean", results["clean_accuracy"]), ("corrupted", results["corrupted_accuracy"])):
        curve = results["risk_coverage"][name]
        assert curve["coverage"][-1] == 1 and curve["risk"][-1] == pytest.approx(1 - accuracy)
        assert 0 <= curve["least_area"] <= curve["area"] <= 1
        calibration = results["calibration"][name]
        assert calibration.keys() == {"before", "after"}
        assert sum(calibration["after"]["reliability"]["count"]) == len(split.labels) * (
            15 if name == "corrupted" else 1
        )
    assert robustness.summarize(found, split.labels, None)["calibration"]["clean"].keys() == {"before"}


def test_least_area_is_that_of_all_errors_last():
    logits = np.diag(np.arange(10, 20.0))[:, ::-1]  # surer and surer of 9, 8, ..., 0
    labels = np.arange(9, -1, -1)
    labels[:3] = (labels[:3] + 1) % 10  # the least sure are wrong
    curve = robustness._risk_coverage(logits, labels)
    assert curve["area"] == pytest.approx(curve["least_area"]) == pytest.approx((1 / 8 + 2 / 9 + 3 / 10) / 10)


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_what_is_printed_says_whether_there_is_a_temperature(measured, temperature, capsys):
    split, found = measured
    robustness.print_results(robustness.summarize(found, split.labels, temperature))
    assert ("no temperature scaling" in capsys.readouterr().out) == (temperature is None)


def test_command_writes_results_and_figures(digits_run):
    out = command("mnist_flax.evaluate", digits_run, "--corruptions").stdout
    results = json.loads((digits_run / "robustness.json").read_text())
    trained = load_run(digits_run)
    test = datasets.load(trained.config).test
    read = make_logits(trained)(test.images).argmax(axis=1)
    assert results["clean_accuracy"] == np.mean(read == test.labels)
    assert (results["dataset"], results["split"], results["checkpoint"]) == ("digits", "test", "last")
    assert results["examples"] == len(test.labels)
    assert 0.1 < results["corrupted_accuracy"] < results["clean_accuracy"]
    assert results["temperature"] == json.loads((digits_run / "calibration.json").read_text())["temperature"]
    assert f"{results['corrupted_accuracy']:.2%} as published" in out and "zigzag" in out
    for name in ("corruptions", "corrupted_accuracy", "affine", "calibration", "risk_coverage"):
        assert Image.open(digits_run / "figures" / f"{name}.png").width >= 900


def test_results_of_another_checkpoint_are_kept_from_the_report(digits_run, tmp_path):
    directory = shutil.copytree(digits_run, tmp_path / "copy")
    before = set(directory.rglob("*.png"))
    command("mnist_flax.evaluate", directory, "--corruptions", "--split=validation", "--checkpoint=best")
    assert json.loads((directory / "robustness_validation_best.json").read_text())["checkpoint"] == "best"
    added = [path.stem for path in set(directory.rglob("*.png")) - before]
    assert len(added) == 5 and all(name.endswith("_validation_best") for name in added)
