import json

import pytest

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
