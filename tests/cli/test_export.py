import shutil
import signal

import numpy as np
import pytest

from mnist_flax.data import datasets
from mnist_flax.runtime import run_dir
from tests.commands import command, finish, refusal, start, wait_for


@pytest.fixture(scope="module")
def directory(digits_run, tmp_path_factory):
    """A run directory of its own, since files are exported into it."""
    return shutil.copytree(digits_run, tmp_path_factory.mktemp("export") / "run")


def test_command_writes_a_file_and_says_how_good_it_is(directory, digits_data_dir):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = command("mnist_flax.export", directory, "--format=onnx").stdout
    assert [path.name for path in (directory / "export").iterdir()] == ["model.onnx"]
    path = directory / "export" / "model.onnx"
    assert f"written to {path} ({path.stat().st_size:,} bytes)" in out
    assert "largest difference of a probability" in out
    for word in ("onnx", "Flax", "accuracy", "ms at batch 1", "ms at batch 256"):
        assert word in out

    split = datasets.load(run_dir.read_config(directory)).test
    assert f"on all {len(split.labels)} test examples" in out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"images": split.images})
    assert f"{np.mean(probabilities.argmax(1) == split.labels):.2%}" in out


def test_output_and_data_dir_can_be_elsewhere(directory, digits_data_dir, tmp_path):
    pytest.importorskip("safetensors")
    moved = tmp_path / "moved"
    moved.symlink_to(digits_data_dir)
    output = tmp_path / "new" / "directory"
    places = (f"--output={output}", f"--data_dir={moved}")
    command("mnist_flax.export", directory, "--format=safetensors", *places, "--checkpoint=best")
    assert [path.name for path in output.iterdir()] == ["model.safetensors"]


def test_asked_to_stop_it_leaves_no_draft(directory, tmp_path):
    process = start("mnist_flax.export", directory, "--format=stablehlo", f"--output={tmp_path}")
    wait_for(lambda: list(tmp_path.iterdir()), process)
    process.terminate()
    finish(process, 128 + signal.SIGTERM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=onnx"], "name one run directory"),
        (["{run}"], "choose what to write: --format=stablehlo|onnx|onnx-int8|safetensors"),
        (["{run}", "--format=tflite"], "tflite"),
        (["{nowhere}", "--format=stablehlo"], "is no run directory"),
        (["{run}", "--format=stablehlo", "--output={file}"], "is a file: name a directory"),
        (["{run}", "--format=stablehlo", "--output={file}/below"], "cannot be written"),
        (["{run}", "--format=stablehlo", "--output="], "--output= names nothing"),
        (["{run}", "--format=stablehlo", "--ouput=x"], "ouput"),
    ],
)
def test_wrong_inputs_get_one_line(arguments, message, directory, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = {"run": directory, "nowhere": tmp_path / "nowhere", "file": tmp_path / "file"}
    assert message in refusal("mnist_flax.export", *(argument.format(**places) for argument in arguments))
    assert (tmp_path / "file").read_text() == "mine"
