import json

import numpy as np
import pytest

from mnist_flax.experiments.benchmarks import contenders, cores
from tests.commands import command, refusal

COMMAND = "experiments.benchmark"


@pytest.fixture
def without_mnist(tmp_path, monkeypatch):
    """Random images, whatever is prepared on this machine."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))


@pytest.mark.parametrize("norm", [(), ("--batch_norm",)], ids=["plain", "batch_norm"])
def test_project_and_plain_flax_run_in_turns(tmp_path, without_mnist, norm):
    named = ("--peers=flax,flax", "--dtype=float32,float32", "--batch=16,32,16")  # each is measured once
    short = (*named, "--rounds=2", "--seconds=0.01", "--check_steps=32")
    out = command(COMMAND, *short, *norm, f"--output={tmp_path / 'out'}").stdout
    assert "random images" in out and "plain Flax" in out and "TFLOP/s" in out
    assert ("with batch norm" in out) == bool(norm)
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    rows = results["rows"]
    assert len(results["exchange_seconds"]) == (4 if cores.CAN_BIND and len(cores.usable()) > 1 else 0)
    assert [(row["contender"], row["batch_size"]) for row in rows] == [
        (name, batch) for batch in (16, 32) for name in ("project", "flax")
    ]
    for row, project in zip(rows, (rows[0], rows[0], rows[2], rows[2]), strict=True):
        ratios = np.divide(project["images_per_second"], row["images_per_second"])
        assert row["project_over_this"] == pytest.approx(ratios) and len(ratios) == 2
        needed = np.median(row["images_per_second"]) * contenders.FLOPS_PER_IMAGE
        assert row["share_of_peak"] == pytest.approx(needed / row["peak_flops"])  # on a busy machine above 1, at times
        assert 1.5 < row["loss"] < 3.5  # labels are random: ln 10 is the best there is
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--peers=caffe", "unknown: choose from torch, keras, flax"),
        ("--batch=12,x", "--batch=x must be a whole number"),
        ("--batch=1000000", "from 1 to 55,000"),
        (f"--batch={'1' * 5_000}", "from 1 to 55,000"),
        ("--dtype=float16", "choose from bfloat16, float32"),
        ("--batch=", "--batch= names nothing"),
        ("--dtype=", "--dtype= names nothing"),
        ("--rounds=0", "rounds"),
    ],
)
def test_mistakes_get_one_line(tmp_path, without_mnist, flag, message):
    error = refusal(COMMAND, "--peers=flax", f"--output={tmp_path / 'out'}", flag)
    assert message in error and not (tmp_path / "out").exists()


def test_a_missing_peer_names_the_extra(tmp_path, without_mnist, monkeypatch):
    from mnist_flax.experiments import benchmark

    monkeypatch.setitem(contenders.PACKAGES, "torch", ["no_such_package"])
    with pytest.raises(benchmark.cli.UserError, match=r"needs no_such_package: run pip install -e '\.\[peers\]'"):
        benchmark.check_flags(["torch"], ["float32"], ["128"], 1000)


def test_a_contender_that_fails_is_named(tmp_path):
    from mnist_flax.experiments import benchmark

    contender = benchmark.Contender("flax", "float32", 8, tmp_path / "missing.npz")
    try:
        with pytest.raises(benchmark.cli.RunError, match=r"plain Flax in float32, batch 8, failed: .*missing\.npz"):
            contender.ask(8)
    finally:
        contender.close()
