import json
import shutil

import pytest

from mnist_flax.experiments.faults.sabotage import events_file, read_events
from mnist_flax.runtime import cli, metrics_log


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    record = {"step": 1, "epoch": 1, "split": "train", "loss": 0.5, "seconds": 1.5}
    metrics = metrics_log.Metrics(tmp_path, "")
    metrics.append(record)
    metrics.append({**record, "step": 2, "epoch": 2})
    metrics.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "ep')  # cut in the middle of a line
    metrics = metrics_log.Metrics(tmp_path, json.dumps(record) + "\n")
    metrics.append({**record, "step": 2, "epoch": 2})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_each_epoch_is_in_tensorboard_once_and_at_once(tmp_path):
    def curve():
        return read_events(events_file(tmp_path))[0]["train/loss"]

    record = {"step": 1, "epoch": 1, "split": "train", "loss": 0.5, "seconds": 1.5}
    metrics = metrics_log.Metrics(tmp_path, "")
    for step in range(1, 40):
        metrics.append({**record, "step": step})
        assert [at for at, _ in curve()] == list(range(1, step + 1))  # while it is being written
    resumed = metrics_log.Metrics(
        tmp_path, "".join((tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:19])
    )
    resumed.append({**record, "step": 20, "loss": 0.25})
    assert curve() == [*((step, 0.5) for step in range(1, 20)), (20, 0.25)]


def test_a_run_directory_that_is_removed_meanwhile_is_one_line(tmp_path, capsys):
    directory = tmp_path / "run"
    directory.mkdir()
    metrics = metrics_log.Metrics(directory, "")
    shutil.rmtree(directory)
    with pytest.raises(FileNotFoundError) as caught:
        metrics.append({"step": 1, "split": "train", "loss": 0.5, "seconds": 1.0})
    assert cli.report(caught.value) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "is gone" in said and said.count("\n") == 1
