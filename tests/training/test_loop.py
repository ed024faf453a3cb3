"""Training on any number of devices, and when it stops early."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mnist_flax.training import loop
from tests.commands import command
from tests.trained import once


@pytest.fixture(scope="module")
def found(digits_data_dir):
    out = digits_data_dir.with_name("many_devices")
    once(out, "found.json", lambda: command("tests.many_devices", digits_data_dir, out, devices=8))
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", ["2", "4", "8", "across"])
def test_any_number_of_devices_trains_alike_and_goes_on_where_another_stopped(found, name):
    one, other = found["records"]["1"], found["records"][name]
    assert [(r["epoch"], r["split"]) for r in one] == [(e, s) for e in (1, 2, 3) for s in ("train", "validation")]
    for mine, theirs in zip(other, one, strict=True):
        assert (mine["step"], mine["split"]) == (theirs["step"], theirs["split"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), mine
        count = 320 if mine["split"] == "train" else 101
        assert mine["accuracy"] * count == pytest.approx(round(mine["accuracy"] * count), abs=1e-3)  # each example once
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=1.01 / count)  # one may fall either way


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(found):
    plain, parts, good = found["refused"]
    assert plain == "config.batch_size=100 must be a multiple of the 8 devices"
    assert parts == "config.batch_size=32 must be a multiple of the 8 devices times config.optimizer.accumulate_steps=8"
    assert good == ""


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 3), st.sampled_from([0.0, 0.4, 1.0]))
def test_training_stops_at_its_target_or_when_patience_ends(fifths, patience, target):
    """The reference counts, epoch by epoch, how long the best accuracy was not exceeded."""
    config = ConfigDict({"patience": patience, "target_accuracy": target})
    records: list[dict] = []
    best, waited = -1.0, 0
    for epoch, accuracy in enumerate((fifth / 5 for fifth in fifths), start=1):
        records.append({"epoch": epoch, "split": "train", "accuracy": 1.0})  # which decides nothing
        assert not loop._early_stop(config, records)
        records.append({"epoch": epoch, "split": "validation", "accuracy": accuracy})
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        stops = (target > 0 and accuracy >= target) or (patience > 0 and waited == patience)
        assert loop._early_stop(config, records) == stops
        if stops:
            break
