import os

from mnist_flax.experiments.benchmarks import cores


def test_processes_share_the_cores():
    before = cores.usable()
    some = {min(before)}
    with cores.bound(some):
        assert cores.usable() == (some if cores.CAN_BIND else before)
    assert cores.usable() == before


def test_a_system_that_binds_no_process_is_no_trouble(monkeypatch):
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(cores, "CAN_BIND", False)
    assert cores.usable() == set(range(os.cpu_count()))
    with cores.bound({0}):
        assert cores.usable() == set(range(os.cpu_count()))


def test_distance_is_measured_where_there_are_two_cores_and_they_stay_as_they_were():
    before = cores.usable()
    seconds = cores.exchange_seconds()
    assert cores.usable() == before
    assert (seconds is None) == (len(before) < 2 or not cores.CAN_BIND)
    assert seconds is None or 2**18 / 1e12 < seconds < 1  # no memory does a terabyte a second
    with cores.bound({min(before)}):
        assert not cores.CAN_BIND or cores.exchange_seconds() is None
