import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from mnist_flax.data import datasets
from mnist_flax.runtime import run_dir
from tests.commands import command, refusal
from tests.inference.test_ensemble import logits_of
from tests.server import running


@pytest.fixture(scope="module")
def splits(digits_ensemble) -> datasets.Splits:
    return datasets.load(run_dir.read_config(digits_ensemble[0]))


@pytest.fixture(scope="module")
def member_logits(digits_ensemble, splits) -> np.ndarray:
    return logits_of(digits_ensemble[1], splits.test)


def test_evaluate_and_report_take_it_as_a_run(digits_ensemble, tmp_path):
    directory = shutil.copytree(digits_ensemble[0], tmp_path / "copy")
    before = {name: (directory / name).read_bytes() for name in ("evaluation_test.json", "figures/mistakes.png")}
    for path in (directory / "evaluation_test.json", directory / "figures" / "mistakes.png", directory / "report.html"):
        path.unlink()
    command("mnist_flax.evaluate", directory)
    command("mnist_flax.report", directory)
    for name, content in before.items():
        assert (directory / name).read_bytes() == content
    page = (directory / "report.html").read_text()
    assert "<h2>Members</h2>" in page and "digits_other" in page
    assert not (directory / "figures" / "learning_curves.png").exists()
    assert "choose no checkpoint" in refusal("mnist_flax.evaluate", directory, "--checkpoint=best")


def test_predict_and_serve_give_its_calibrated_probabilities(digits_ensemble, member_logits, splits, tmp_path):
    expected = softmax(member_logits.astype(np.float64), axis=-1).mean(0)
    directory = shutil.copytree(digits_ensemble[0], tmp_path / "copy")
    with running(directory) as server:
        calibration = json.loads((directory / "calibration.json").read_text())
        calibrated = softmax(np.log(expected) / calibration["temperature"], axis=1)
        for image, want in zip(splits.test.images[:5], calibrated, strict=False):
            answer = server.post("/api/explain", {"pixels": image.tolist()})
            np.testing.assert_allclose(answer["probabilities"], want, atol=1e-5)
        assert [layer["shape"] for layer in answer["layers"]] == [[8, 14, 14], [16, 7, 7], [64]]  # of the first member
        described = server.get("/api/run")
        assert described["members"] == 3
        assert described["parameters"] == run_dir.read_summary(directory)["parameters"]
        wrong = np.flatnonzero(expected.argmax(1) != splits.test.labels)
        assert sorted(mistake["index"] for mistake in server.get("/api/mistakes")["mistakes"]) == wrong.tolist()
    Image.fromarray(255 - splits.test.images[0]).resize((112, 112)).save(tmp_path / "digit.png")
    out = command("mnist_flax.predict", directory, tmp_path / "digit.png", "--threshold=0").stdout
    assert out.startswith(f"{tmp_path / 'digit.png'}: {splits.test.labels[0]} (")


def test_export_command_proves_its_file(digits_ensemble, tmp_path):
    out = command("mnist_flax.export", digits_ensemble[0], "--format=stablehlo", f"--output={tmp_path}").stdout
    assert "on all 359 test examples" in out
    assert [path.name for path in tmp_path.iterdir()] == ["model.stablehlo"]


def test_a_finished_one_is_shown_again_without_its_members(digits_ensemble):
    directory, _ = digits_ensemble
    paths = [member["path"] for member in json.loads((directory / "config.json").read_text())["members"]]
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    out = command("mnist_flax.ensemble", *reversed(paths), f"--workdir={directory}").stdout
    assert out.startswith(str(directory)) and "test_accuracy" in out
    refused = refusal("mnist_flax.ensemble", *reversed(paths), f"--workdir={directory}", "--disjoint=1")
    assert "name them in that order" in refused
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_an_unfinished_one_is_made_anew_and_disjoint_ones_are_scored(digits_ensemble, member_logits, splits, tmp_path):
    places = digits_ensemble[1][:2]
    directory = tmp_path / "new"
    command("mnist_flax.ensemble", *places, f"--workdir={directory}")
    (directory / "summary.json").unlink()
    for path in [path for path in (directory / "checkpoints").rglob("*") if path.is_file()][::2]:
        path.unlink()  # as if stopped while it wrote
    out = command("mnist_flax.ensemble", *places, f"--workdir={directory}", "--disjoint=1").stdout
    assert run_dir.read_summary(directory)["members"] == 2
    scores = json.loads((directory / "disjoint_1.json").read_text())
    want = (member_logits[:2].argmax(-1) == splits.test.labels).mean(1)
    np.testing.assert_allclose(scores["test_accuracies"], want, atol=1.1 / len(splits.test.labels))
    assert scores["deviation"] == pytest.approx(np.std(scores["test_accuracies"], ddof=1))
    assert f"mean {np.mean(scores['test_accuracies']):.3%}" in out and "n = 2" in out


def test_wrong_arguments_get_one_line(digits_ensemble, tmp_path):
    directory, (first, second, _) = digits_ensemble
    copy = shutil.copytree(second, tmp_path / "copy")
    for arguments, message in (
        ([first], "name two or more"),
        ([first, first / ".." / first.name], "more than once"),
        ([first, second, "--workdir="], "names nothing"),
        ([first, second, "--disjoint=2"], "needs 4 runs or more"),
        ([second, copy, f"--workdir={tmp_path / 'new'}"], "are the same network"),
    ):
        assert message in refusal("mnist_flax.ensemble", *arguments)
    assert not (tmp_path / "new").exists()
    main = ("mnist_flax.main", "--config=configs/digits.py", f"--workdir={directory}")
    assert "holds an ensemble" in refusal(*main)
