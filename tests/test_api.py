"""The public API: what DESIGN promises of `import mnist_flax as mf`, tried as a notebook would."""

import json
import re
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from scipy.special import softmax

import mnist_flax as mf
from mnist_flax.data import datasets
from tests.commands import ROOT, command, environment

TINY = {"num_epochs": 1, "model": {"channels": (4,), "pool_sizes": (4,), "dense": ()}}


@pytest.fixture(scope="module")
def run(digits_run):
    return mf.load(digits_run)


@pytest.fixture(scope="module")
def images(run):
    return datasets.load(run.config).test.images[:40]


def test_importing_imports_nothing_and_changes_nothing():
    code = (
        "import gc, signal, sys; before = gc.get_threshold(), signal.getsignal(signal.SIGINT), sys.unraisablehook\n"
        "import mnist_flax\n"
        "assert before == (gc.get_threshold(), signal.getsignal(signal.SIGINT), sys.unraisablehook)\n"
        "found = {'jax', 'matplotlib', 'flax', 'absl', 'numpy'} & set(sys.modules); assert not found, found\n"
        "assert {'get_config', 'train', 'load', 'Run'} <= set(dir(mnist_flax))\n"
        "mnist_flax.get_config; import warnings\n"
        "assert before == (gc.get_threshold(), signal.getsignal(signal.SIGINT), sys.unraisablehook)\n"
        "assert 'matplotlib' not in sys.modules and warnings.showwarning.__module__ == 'warnings'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)


def test_configs_take_overrides_which_references_follow(tmp_path):
    config = mf.get_config("configs/digits.py", num_epochs=5, model={"channels": [8, 16]})
    assert (config.num_epochs, config.model.channels, config.dataset) == (5, (8, 16), "digits")
    assert mf.get_config("configs/default.py:kmnist").dataset == "kmnist"
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from mnist_flax.configs import default\n\n\ndef get_config():\n    config = default.get_config()\n"
        "    config.optimizer.warmup_epochs = 0.1 * config.get_oneway_ref('num_epochs').to_float()\n    return config\n"
    )
    assert mf.get_config(str(recipe), num_epochs=30).optimizer.warmup_epochs == 3.0


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("configs/digts.py", {}, "is no file"),
        ("configs/digits.py", {"num_epoch": 3}, "did you mean config.num_epochs"),
        ("configs/digits.py", {"num_epochs": 0}, "out of range"),
        ("configs/digits.py", {"num_epochs": 2.5}, "config.num_epochs=2.5"),
        ("configs/digits.py", {"model": {"channels": ()}}, "empty"),
    ],
)
def test_mistakes_in_a_config_are_user_errors(recipe, overrides, message):
    with pytest.raises(mf.UserError, match=message) as caught:
        mf.get_config(recipe, **overrides)
    assert "\n" not in str(caught.value)


def test_a_run_knows_what_its_directory_holds(run, digits_run):
    assert run.summary == json.loads((digits_run / "summary.json").read_text())
    assert run.metrics == [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    assert run.class_names == tuple("0123456789") and run.config.dataset == "digits"
    assert run.evaluate("test") == json.loads((digits_run / "evaluation_test.json").read_text())


def test_predictions_are_those_of_plain_flax(run, images):
    logits = np.asarray(run.model.apply(run.variables, images.astype(np.float32) / 255))
    np.testing.assert_allclose(run.logits(images), logits, rtol=0.05, atol=0.05)  # which may compute in bfloat16
    probabilities = run.predict(images)
    assert probabilities.dtype == np.float32 and probabilities.shape == (40, 10)
    np.testing.assert_allclose(probabilities, softmax(run.logits(images).astype(np.float64), axis=1), atol=1e-6)
    for form in (images[..., None], images / 255, (images / 255)[..., None].astype(np.float32)):
        np.testing.assert_allclose(run.predict(form), probabilities, atol=1e-6)
    assert run.predict(images[:0]).shape == (0, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: images.astype(np.float32), "images range from 0 to 255: give floats from 0 to 1"),
        (lambda images: images.astype(np.int64), "images are int64"),
        (lambda images: images[0], r"images have the shape \[28, 28\]: give \[n, 28, 28\]"),
        (lambda images: images[:, :14], r"\[40, 14, 28\]"),
        (lambda images: np.stack([images] * 3, axis=-1), r"\[40, 28, 28, 3\]"),
        (lambda images: np.where(images > 0, np.nan, 0.0), "images range from nan"),
    ],
)
def test_images_of_another_form_are_refused_by_name(run, images, make, message):
    for call in (run.predict, run.logits, run.features):
        with pytest.raises(mf.UserError, match=message):
            call(make(images))


def test_features_are_named_by_layer_in_order(run, images):
    features = run.features(images)
    assert list(features) == ["conv0", "conv1", "dense0", "logits"]
    assert features["conv0"].shape == (40, 14, 14, 8) and features["dense0"].shape == (40, 64)
    np.testing.assert_allclose(features["logits"], run.logits(images), rtol=1e-4, atol=1e-4)


def test_reading_gives_what_the_command_prints(run, digits_run):
    (line,) = command("mnist_flax.predict", digits_run, "docs/form.png", "--layout=page", "--json").stdout.splitlines()
    assert run.read(ROOT / "docs" / "form.png", layout="page") == json.loads(line) | {
        "file": str(ROOT / "docs" / "form.png")
    }
    with pytest.raises(mf.UserError, match="layout='pages' is unknown"):
        run.read("docs/form.png", layout="pages")
    with pytest.raises(mf.UserError, match=r"nothing\.png"):
        run.read("nothing.png")


def test_exports_to_the_path_that_is_named(run, tmp_path):
    assert run.export("safetensors", tmp_path / "new" / "digits.safetensors") == tmp_path / "new" / "digits.safetensors"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["digits.safetensors"]
    with pytest.raises(mf.UserError, match="format 'onx' is unknown"):
        run.export("onx", tmp_path / "x")


def test_training_prints_nothing_and_works_in_a_thread_and_twice(digits_data_dir, tmp_path, capfd):
    config = mf.get_config("configs/digits.py", data_dir=str(digits_data_dir), **TINY)
    runs = {}
    threads = [
        threading.Thread(target=lambda i=i: runs.update({i: mf.train(config, tmp_path / str(i))})) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert capfd.readouterr() == ("", "")
    same = [jax.tree.leaves(runs[i].variables) for i in (0, 1)]
    for ours, theirs in zip(*same, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(run.summary["total_seconds"] < 60 for run in runs.values())
    before = (tmp_path / "0" / "summary.json").stat().st_mtime_ns
    assert mf.train(config, tmp_path / "0").summary == runs[0].summary  # finished: just returned
    assert (tmp_path / "0" / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(mf.UserError, match="another config"):
        mf.train(mf.get_config("configs/digits.py", data_dir=str(digits_data_dir), seed=1, **TINY), tmp_path / "0")


def test_the_lines_of_the_readme_run_as_they_stand(digits_data_dir, tmp_path):
    (lines,) = re.findall(r"```python\n(import mnist_flax as mf\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    small = f"num_epochs=1, data_dir={str(digits_data_dir)!r}, model={{'channels': (4,), 'dense': ()}}"
    quick = lines.replace("num_epochs=5)", f"{small})")
    assert quick != lines
    code = f"import numpy as np\n{quick}\nassert probabilities.shape == logits.shape == (2, 10) and path.exists()"
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("test accuracy" in text for text in texts)
