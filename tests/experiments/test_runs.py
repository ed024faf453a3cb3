from mnist_flax.experiments.benchmarks import cores
from mnist_flax.experiments.record import runs


def test_parts_of_runs_count_for_the_time_left_and_for_no_run(capsys):
    with runs._bar("train", 4) as show:
        for done, parts in ((0, 1.0), (0, 1.9), (1, 1.0), (4, 0.0)):
            show(done, parts)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"train: {done} of 4 runs" for done in (0, 1, 4)]
    assert [" left" in line for line in lines] == [False, True, False]
    assert runs.time_left(4_800, 0.4, 9.6) == ", about 1 day, 8:00:00 left"
    assert runs.time_left(60, 0.5, 1.5) == ", about 0:03:00 left"


def test_every_process_has_cores_of_its_own_if_there_are_enough(monkeypatch):
    monkeypatch.setattr(cores, "usable", lambda: {1, 4, 5})
    assert runs._core_shares(2) == [{1, 5}, {4}]
    assert runs._core_shares(4) == [{1}, {4}, {5}, {1, 4, 5}]
