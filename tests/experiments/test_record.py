import json
import re
import signal

import pytest

from mnist_flax.runtime import run_dir
from tests.commands import command, finish, refusal, start, wait_for

SMALL = [
    "--config.dataset=digits",
    "--config.num_epochs=2",
    "--config.optimizer.warmup_epochs=0.5",
    "--config.model.channels=(4,)",
    "--config.model.kernel_sizes=(3,)",
    "--config.model.pool_sizes=(2,)",
]


@pytest.mark.slow
def test_the_test_set_is_scored_only_when_all_have_trained(tmp_path, digits_data_dir):
    recipes = ("--config=configs/digits.py", "--reference=configs/tiny.py", "--seeds=2", "--ensemble=2")
    arguments = (*recipes, f"--workdir={tmp_path}", "--", f"--config.data_dir={digits_data_dir}", *SMALL)
    with run_dir.claim(tmp_path / "digits" / "0"):  # as a training does whose command was killed
        process = start("experiments.record", *arguments)
        assert "waiting for digits 0" in process.stdout.readline()
        assert not (tmp_path / "digits" / "1").exists()
    wait_for(lambda: (tmp_path / "digits" / "1" / "metrics.jsonl").exists(), process, 200)
    process.send_signal(signal.SIGTERM)
    assert "goes on from here" in finish(process).stdout
    assert (tmp_path / "digits" / "0" / "checkpoints").exists()  # trained
    assert not list(tmp_path.glob("**/evaluation_test.json"))
    (tmp_path / "digits" / "1" / "metrics.jsonl").write_text("damaged, as training can be without\n")

    out = command("experiments.record", *arguments).stdout
    assert "score: 4 of 4 runs" in out
    found = json.loads((tmp_path / "results.json").read_text())
    for key, recipe in (("accuracy", "digits"), ("reference_accuracy", "tiny")):
        summaries = [json.loads((tmp_path / recipe / f"{seed}/summary.json").read_text()) for seed in range(2)]
        assert found[key]["values"] == pytest.approx([each["test_accuracy"] for each in summaries])
    assert json.loads((tmp_path / "digits_ensemble_2" / "summary.json").read_text())["members"] == 2
    text = (tmp_path / "results.md").read_text()
    assert "| 1 |" in text and text.startswith("Test accuracy on digits (359 examples), 1 x ")

    error = refusal("experiments.record", *arguments, "--config.eval_batch_size=77")
    assert re.search(r"holds a run of another config \(eval_batch_size: \d+ -> 77\)", error)

    out = command("experiments.record", "--views=3", *arguments).stdout
    found = json.loads((tmp_path / "results.json").read_text())
    for seed in range(2):
        command("mnist_flax.evaluate", tmp_path / "digits" / str(seed), "--views=3")
        scores = json.loads((tmp_path / "digits" / str(seed) / "evaluation_test_3_views.json").read_text())
        assert found["views_accuracy"]["values"][seed] == pytest.approx(scores["accuracy"])
    assert "3 views, disjoint ensembles of 2" in out and len(found["views_ensemble_accuracy"]["values"]) == 1

    process = start("experiments.record", "--views=1000000", *arguments)
    assert process.stdout.readline().startswith("all are scored")
    process.send_signal(signal.SIGTERM)
    assert "goes on from here" in finish(process).stdout

    # Of another recipe in the same directory the ensemble is another, and what stands in its place gets one line.
    swapped = ("--config=configs/tiny.py", "--reference=configs/digits.py", *arguments[2:])
    (tmp_path / "tiny_ensemble_2").mkdir()
    (tmp_path / "tiny_ensemble_2" / "notes.txt").touch()
    assert "tiny_ensemble_2 is neither empty nor an ensemble" in refusal("experiments.record", *swapped)
    assert json.loads((tmp_path / "results.json").read_text())["recipe"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--ensemble=9"], "--seeds=9"),
        (["--workdir="], "names nothing"),
        (["--config=configs/no.py"], "error: configs/no.py is no file"),
        (["--seeds=1"], "seeds"),
        (["oops"], "'oops' is no flag"),
        (["--config=configs/default.py"], "two recipes of different names"),
        (["--config={}/default.py"], "two recipes of different names"),
        (["--views=3", "--", "--config.augment.final_scale=0.0"], "leave them out"),
        (["--", "--config.augment.final_scales=0.0"], "did you mean"),
        (["--", "--config.batch_size=0"], "out of range"),
        (["--reference={}/other.py"], "get_config"),
        (["--config=configs/digits.py"], "different datasets (digits, mnist)"),
    ],
)
def test_mistakes(arguments, hint, tmp_path):
    for name in ("default.py", "other.py"):
        (tmp_path / name).touch()
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert hint in refusal("experiments.record", f"--workdir={tmp_path / 'record'}", *arguments)
    assert not (tmp_path / "record").exists()


def test_a_run_that_fails_is_named(tmp_path):
    empty = [f"--config.{field}={tmp_path}" for field in ("data_dir", "archive_dir")]
    error = command("experiments.record", f"--workdir={tmp_path}", "--", *empty, status=1).stderr
    assert "record 0 ended with status 2" in error
    assert "train-images-idx3-ubyte.gz is missing" in (tmp_path / "record" / "0.log").read_text()
