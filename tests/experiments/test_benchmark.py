import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_flax.configs import classic
from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import contenders, cores
from mnist_flax.runtime import config as config_lib
from mnist_flax.training import step
from mnist_flax.training.loss import cross_entropy
from mnist_flax.training.state import hyperparameters, init_state
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


def test_what_is_no_flag_gets_one_line():
    assert "'bfloat16' is no flag" in refusal("experiments.bench_conv", "bfloat16")


def test_a_place_to_save_to_that_is_not_there_gets_one_line():
    assert "--directory=nope/x is no directory" in refusal("experiments.bench_saving", "--directory=nope/x")


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


@given(batch_size=st.integers(1, 50), examples=st.integers(50, 200), step=st.integers(0, 500), steps=st.integers(1, 40))
def test_rows_are_the_batches_of_the_projects_own_runs(batch_size, examples, step, steps):
    nothing = np.zeros((examples, 28, 28), np.uint8)
    rows = contenders.Task("float32", batch_size, nothing, np.zeros(examples, np.int32)).rows(step, steps)
    per_epoch = examples // batch_size
    seed = classic.get_config().seed
    for offset, batch in enumerate(rows):
        epoch, place = divmod(step + offset, per_epoch)
        np.testing.assert_array_equal(batch, datasets.epoch_order(seed, epoch, examples, batch_size)[place])
    assert len(rows) == steps


def test_burst_losses_of_the_project_are_means_over_their_steps():
    """Across epochs, against losses of single steps; the first is that of the untrained network."""
    from mnist_flax.experiments.benchmarks.contenders import project

    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (40, 28, 28), np.uint8), np.arange(40, dtype=np.int32) % 10
    task = contenders.Task("float32", 8, images, labels)
    singly = project.make(task)
    losses = [singly(1) for _ in range(16)]  # three epochs of five steps and one
    assert project.make(task)(16) == pytest.approx(np.mean(losses), rel=1e-4)
    config = classic.get_config()
    config.model.compute_dtype = "float32"
    variables = init_state(config, 10, config.seed).variables()
    model = step.make_model(config.model, hyperparameters(config), 10)
    rows = task.rows(0, 1)[0]
    first = cross_entropy(model.apply(variables, step.normalize(images[rows])), labels[rows]).mean()
    assert losses[0] == pytest.approx(float(first), rel=1e-4)


def test_network_of_the_comparison_is_the_recipes():
    config = classic.get_config()
    config_lib.check_config(config)
    assert config.optimizer.learning_rate == contenders.LEARNING_RATE
    import jax

    shapes = jax.eval_shape(lambda: init_state(config, 10, 0)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 320 + 18_496 + 803_072 + 2_570


def test_work_of_an_image_is_what_xla_counts():
    """Forward and backward of plain convolutions, as XLA's own cost analysis sees them."""
    import jax
    import jax.numpy as jnp

    from mnist_flax.experiments.benchmarks.contenders.plain_flax import CNN

    model, batch = CNN("float32"), 4
    images = jnp.ones((batch, 28, 28, 1))
    params = model.init(jax.random.key(0), images)
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, images).sum()))
    counted = gradient.lower(params).cost_analysis()["flops"] / batch
    assert pytest.approx(counted, rel=0.1) == contenders.FLOPS_PER_IMAGE  # XLA counts padding, ReLU and pooling too
