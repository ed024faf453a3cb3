import json
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from mnist_flax.data import datasets
from mnist_flax.inference import formats
from mnist_flax.inference.run import Run, load_run
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import devices, run_dir
from mnist_flax.runtime.cli import RunError, UserError
from mnist_flax.training import loop
from tests.models.test_folded import Residual, model_config, network, plugged_in, random_variables

IN_ONNX = ("onnx", "onnxruntime")


@pytest.fixture(scope="module")
def trained(digits_data_dir, tmp_path_factory) -> Run:
    """A small network that has learned the embedded digits, in a run directory."""
    config = config_lib.default_config()
    config.dataset, config.data_dir = "digits", str(digits_data_dir)
    config.validation_examples, config.batch_size, config.num_epochs, config.eval_batch_size = 100, 32, 8, 100
    config.model.update({"channels": (8, 8), "pool_sizes": (2, 2), "batch_norm": True, "dense": (24,)})
    config.optimizer.update({"learning_rate": 1e-2, "ema_decay": 0.0})
    config.augment.update({"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "shear": 0.0})
    directory, mesh = tmp_path_factory.mktemp("run"), devices.make_mesh()
    run_dir.write_config(directory, config, devices.describe(mesh))
    loop.fit(config, datasets.load(config), 10, directory, mesh, lambda: False)
    return load_run(directory)


@pytest.fixture(scope="module")
def splits(trained):
    return datasets.load(trained.config)


def outlying(trained: Run) -> Run:
    """The same function in float32, but one channel of the first layer dwarfs the others: no eight bits hold both."""
    params = jax.tree.map(np.array, trained.variables["params"])
    params["norm0"]["scale"][0] *= 1e5
    params["norm0"]["bias"][0] *= 1e5
    params["conv1_kernel"][:, :, 0] /= 1e5
    return trained._replace(variables=trained.variables | {"params": params})


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_export_predicts_what_the_run_predicts(name, trained, splits, tmp_path):
    needs(*formats.FORMATS[name].packages)
    export = formats.export(trained, splits, name, tmp_path / formats.FORMATS[name].file_name)
    assert [path.name for path in tmp_path.iterdir()] == [export.path.name]
    (tmp_path / "like any other").touch()
    assert export.path.stat().st_mode == (tmp_path / "like any other").stat().st_mode  # not private to its writer
    comparison = export.comparison
    assert comparison.examples == len(splits.test.labels)
    assert comparison.flax_accuracy > 0.9  # it has learned something
    assert comparison.largest_difference < (0.5 if name == "onnx-int8" else 1e-5)
    assert abs(comparison.accuracy - comparison.flax_accuracy) <= (0.006 if name == "onnx-int8" else 0)
    found = formats.latencies(export.models, splits.test.images)
    assert set(found) == {1, 256}
    for latencies in found.values():
        assert set(latencies) == {name, "Flax"}
        assert all(0 < ms.low <= ms.median <= ms.high for ms in latencies.values())

    predict = formats.FORMATS[name].load(export.path)
    whole = predict(splits.test.images[:7])
    assert whole.dtype == np.float32 and whole.shape == (7, 10)
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)
    for size in (0, 1, 3):  # any batch size, one image a row
        np.testing.assert_allclose(predict(splits.test.images[:size]), whole[:size], atol=1e-6)


def test_stablehlo_is_for_every_platform_and_batch_size(trained, tmp_path):
    formats.export_stablehlo(trained, np.zeros((0, 28, 28), np.uint8), tmp_path / "model")
    exported = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (images,), (probabilities,) = exported.in_avals, exported.out_avals
    assert (str(images.shape), images.dtype) == ("(batch_plus_1 - 1, 28, 28)", np.uint8)
    assert (str(probabilities.shape), probabilities.dtype) == ("(batch_plus_1 - 1, 10)", np.float32)
    assert "stablehlo.convolution" in exported.mlir_module()


def test_onnx_is_compact_and_standard(trained, splits, tmp_path):
    needs(*IN_ONNX)
    import onnx
    import onnx.reference

    formats.export_onnx(trained, splits.train.images, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    kinds = [node.op_type for node in model.graph.node]
    layers = ["Conv", "Relu", "MaxPool"] * 2 + ["Flatten", "Gemm", "Relu", "Gemm", "Softmax"]
    assert kinds == ["Cast", "Div", "Unsqueeze", *layers]
    assert next(dimension.dim_param for dimension in model.graph.input[0].type.tensor_type.shape.dim) == "batch"
    properties = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert properties["class_names"] == list(datasets.CLASS_NAMES["digits"])
    assert properties["config"]["dataset"] == "digits"
    # An implementation of ONNX in NumPy, which knows nothing of ONNX Runtime's.
    (result,) = onnx.reference.ReferenceEvaluator(model).run(None, {"images": splits.test.images[:3]})
    expected = formats.flax_predict(trained.model, trained.variables)(splits.test.images[:3])
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_network_that_is_not_built_in_is_exported(name, splits, tmp_path):
    needs(*formats.FORMATS[name].packages, *(["jax2onnx"] if "onnx" in name else []))
    plugged = plugged_in(Residual())
    export = formats.export(plugged, splits, name, tmp_path / formats.FORMATS[name].file_name)
    assert export.comparison.largest_difference < (0.5 if name == "onnx-int8" else 1e-5)
    predict = formats.FORMATS[name].load(export.path, plugged.model)
    logits = plugged.model.apply(plugged.variables, splits.test.images[:7, ..., None].astype(np.float32) / 255)
    np.testing.assert_allclose(
        predict(splits.test.images[:7]), jax.nn.softmax(logits), atol=0.5 if name == "onnx-int8" else 1e-5
    )


class CallsPython(nn.Module):
    """No file can hold it."""

    @nn.compact
    def __call__(self, images):
        logits = nn.Dense(10)(images.mean(1)[..., 0])
        return jax.pure_callback(lambda x: x, logits, logits)


@pytest.mark.parametrize(("name", "converter"), [("stablehlo", "jax.export"), ("onnx", "jax2onnx")])
def test_a_network_that_cannot_be_converted_gets_one_line(name, converter, splits, tmp_path):
    needs(*formats.FORMATS[name].packages, *(["jax2onnx"] if "onnx" in name else []))
    with pytest.raises(RunError, match=rf"^{converter} cannot convert the network \(.*\): try another") as error:
        formats.export(plugged_in(CallsPython()), splits, name, tmp_path / formats.FORMATS[name].file_name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_jax2onnx_is_asked_for_by_other_networks_alone(trained, splits, tmp_path, monkeypatch):
    needs(*IN_ONNX)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    formats.export_onnx(trained, splits.train.images, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"needs jax2onnx: run pip install 'mnist_flax\[export-any\]'"):
        formats.export(plugged_in(Residual()), splits, "onnx", tmp_path / "new" / formats.FORMATS["onnx"].file_name)
    assert not list((tmp_path / "new").iterdir())


def test_eight_bits_hold_every_kernel(trained, splits, tmp_path):
    needs(*IN_ONNX)
    import onnx

    formats.export_onnx(trained, splits.train.images, tmp_path / "exact.onnx")
    formats.export_int8(trained, splits.train.images[:100], tmp_path / "model.onnx")
    arrays = {
        array.name: onnx.numpy_helper.to_array(array) for array in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    kernels = [array for array in arrays.values() if array.ndim > 1 and array.dtype == np.int8]
    assert sorted(kernel.size for kernel in kernels) == sorted([9 * 8, 9 * 64, 49 * 8 * 24, 24 * 10])
    # Instructions that add two products in 16 bits cannot overflow: 2 * 64 * 255 < 2**15.
    assert all(np.abs(kernel.astype(int)).max() <= 64 for kernel in kernels)
    assert all(array.size <= 24 for array in arrays.values() if array.dtype == np.float32)  # scales alone
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "exact.onnx")]
    assert sizes[0] < sizes[1] / 2


def test_safetensors_hold_the_very_parameters_and_the_config(trained, tmp_path):
    needs("safetensors")
    from safetensors import safe_open

    formats.export_safetensors(trained, np.zeros((0, 28, 28), np.uint8), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    leaves = jax.tree_util.tree_leaves_with_path(trained.variables)
    assert len(arrays) == len(leaves)
    for path, leaf in leaves:
        np.testing.assert_array_equal(arrays["/".join(entry.key for entry in path)], leaf)
    recorded = json.loads((trained.directory / "config.json").read_text())["config"]
    assert json.loads(metadata["config"]) == recorded
    assert json.loads(metadata["class_names"]) == list(trained.class_names)


def test_an_export_that_differs_is_not_kept(trained, splits, tmp_path):
    needs(*IN_ONNX)
    broken = outlying(trained)
    with pytest.raises(RunError, match=r"differs from the Flax model.*accuracy .* instead of 9\d"):
        formats.export(broken, splits, "onnx-int8", tmp_path / formats.FORMATS["onnx-int8"].file_name)
    assert not list(tmp_path.iterdir())


def test_an_export_with_numbers_that_are_none_is_not_kept(trained, splits, tmp_path):
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), trained.variables["params"])
    broken = trained._replace(variables=trained.variables | {"params": params})
    with pytest.raises(RunError, match="by up to inf"):
        formats.export(broken, splits, "stablehlo", tmp_path / "new" / formats.FORMATS["stablehlo"].file_name)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("difference", "accuracy", "passes"),
    [(0.0, 0.99, True), (9e-5, 0.9895, True), (2e-4, 0.99, False), (0.0, 0.98, False), (0.0, 1.0, True)],
)
def test_tolerances_of_an_exact_format(difference, accuracy, passes):
    comparison = formats.Comparison(1000, accuracy, 0.99, difference)
    if passes:
        formats.check_parity(comparison, formats.FORMATS["onnx"])
    else:
        with pytest.raises(RunError):
            formats.check_parity(comparison, formats.FORMATS["onnx"])


def test_comparison_covers_every_example(splits):
    """A model that is wrong in one place only, in the last example of the last, smaller batch."""

    def reference(images):
        return np.eye(10, dtype=np.float32)[images[:, 0, 0] % 10]

    split = splits.test._replace(images=np.zeros((101, 28, 28), np.uint8), labels=np.zeros(101, np.int32))
    split.images[100] = 7

    def wrong_at_the_end(images):
        return reference(np.where(images == 7, 1, images)) * np.float32(0.75)

    comparison = formats.compare(wrong_at_the_end, reference, split, 50)
    assert comparison.examples == 101
    assert comparison.largest_difference == 1.0
    assert comparison.accuracy == comparison.flax_accuracy == 100 / 101


def test_missing_packages_are_named(monkeypatch):
    formats.check_packages("stablehlo")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # which is how Python marks what cannot be imported
    with pytest.raises(UserError, match=r"needs onnxruntime: run pip install 'mnist_flax\[export\]'") as error:
        formats.check_packages("onnx-int8")
    assert "\n" not in str(error.value)


def test_calibration_images_are_spread_over_the_training_split():
    images = np.arange(2_500)[:, None, None]
    chosen = formats.calibration_images(images)
    assert 500 < len(chosen) <= formats.CALIBRATION_IMAGES
    assert chosen[0] == 0 and chosen[-1] > 2_490
    assert len(formats.calibration_images(images[:10])) == 10


def test_an_onnx_file_with_large_kernels_stands_alone(splits, tmp_path):
    needs(*IN_ONNX)
    config = model_config({"channels": (8,), "pool_sizes": (1,), "dense": (64,)})  # 1.6 MB of them
    large = Run(tmp_path, config, network(config), random_variables(config), tuple("0123456789"))
    formats.export_onnx(large, splits.train.images, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    predict = formats.load_onnx((tmp_path / "model.onnx").rename(tmp_path / "elsewhere.onnx"))
    reference = formats.flax_predict(large.model, large.variables)
    images = splits.test.images[:9]
    np.testing.assert_allclose(predict(images), reference(images), atol=1e-5)
