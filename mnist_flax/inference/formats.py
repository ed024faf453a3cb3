"""The files that a trained model can be exported to: how each is written, loaded back, compared and timed.

A graph takes pixels, uint8 [batch, 28, 28], and gives probabilities, float32 [batch, classes]; safetensors holds the
parameters alone.
"""

import contextlib
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mnist_flax.inference.run import Run
from mnist_flax.runtime import cli, files
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.settings import pinned

Images = UInt8[np.ndarray, "batch 28 28"]
Predict = Callable[[Images], Float[np.ndarray, "batch classes"]]


class Format(NamedTuple):
    """One kind of file: how it is written, how it is loaded back, and how close it has to be."""

    file_name: str
    packages: tuple[str, ...]  # beyond what training needs
    write: Callable[[Run, Images, Path], None]  # (run, calibration images, path)
    load: Callable[..., Predict]  # (path), and the network where it is not a built-in one
    largest_difference: float  # of a probability, allowed anywhere on the test split
    largest_loss: float  # of accuracy, allowed on the test split


# Float32 results differ by rounding alone. Eight bits may cost one prediction in a hundred at the very most: a
# sound quantisation costs one in a thousand, a broken one ten in a hundred.
_EXACT: dict[str, Any] = {"largest_difference": 1e-4, "largest_loss": 1e-3}
_EIGHT_BITS: dict[str, Any] = {"largest_difference": 1.0, "largest_loss": 1e-2}

CALIBRATION_IMAGES = 1_000
LATENCY_BATCHES = {1: 200, 256: 30}  # images a call, and how often each side is timed


# Writing and loading, format by format


def export_stablehlo(trained: Run, calibration: Images, path: Path) -> None:
    """Writes StableHLO as `jax.export` serialises it, for any batch size, on cpu, cuda and tpu."""
    import jax
    import jax.numpy as jnp
    from jax import export

    from mnist_flax.models import folded

    function = jax.jit(_probabilities(*folded.fold_batch_norm(trained.model, trained.variables)))
    shape = export.symbolic_shape("batch_plus_1 - 1, 28, 28")  # a variable is at least 1, a batch may be empty
    with _failures_of("jax.export"):
        exported = export.export(function, platforms=("cpu", "cuda", "tpu"))(jax.ShapeDtypeStruct(shape, jnp.uint8))
        content = exported.serialize()
    path.write_bytes(content)


def load_stablehlo(path: Path, network: Any = None) -> Predict:
    """The model in a file of `export_stablehlo`, compiled for the device at hand."""
    import jax
    from jax import export

    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: np.asarray(call(images))


def export_onnx(trained: Run, calibration: Images, path: Path) -> None:
    """Writes an ONNX model with a symbolic batch dimension and in standard operators only.

    Raises:
      UserError: a network that is not built in needs jax2onnx, which is not installed.
      RunError: jax2onnx cannot convert it.
    """
    import onnx

    from mnist_flax.inference import onnx_graph
    from mnist_flax.models import cnn, folded

    network, variables = folded.fold_batch_norm(trained.model, trained.variables)
    build = onnx_graph.build if cnn.is_built_in(network) else _convert
    graph = build(network, variables)
    onnx.helper.set_model_props(graph, _metadata(trained))
    _save_onnx(graph, path)


def _convert(network: Any, variables: Mapping[str, Any]) -> Any:
    """Any network as an ONNX model, by jax2onnx."""
    import jax
    import jax.numpy as jnp
    import onnx
    import onnxruntime

    from mnist_flax.inference import onnx_graph

    try:
        import jax2onnx
    except ImportError as error:
        raise cli.UserError(
            "ONNX of a network that is not built in needs jax2onnx: run pip install 'mnist_flax[export-any]', "
            "or use the format stablehlo"
        ) from error
    # ONNX Runtime's basic optimisations stay within the standard: transpositions between JAX's layout and that
    # of ONNX cancel out, biases go into their convolutions, and constant shapes are computed.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with _quiet(), _failures_of("jax2onnx"), tempfile.TemporaryDirectory() as temporary:
        converted = jax2onnx.to_onnx(
            _probabilities(network, variables),
            [jax.ShapeDtypeStruct(("batch", 28, 28), jnp.uint8)],
            model_name="mnist_flax",
            opset=onnx_graph.OPSET,  # the first in which all reductions take their axes as jax2onnx gives them
            return_mode="proto",  # a file would leave large kernels to another file beside it
            input_names=["images"],
            output_names=["probabilities"],
        )
        options.optimized_model_filepath = str(Path(temporary) / "model.onnx")
        onnxruntime.InferenceSession(converted.SerializeToString(), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    standard = [opset for opset in model.opset_import if not opset.domain]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    return model


def _save_onnx(model, path: Path) -> None:
    """Checks and writes an ONNX model, without what can be inferred from the rest."""
    import onnx

    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def export_int8(trained: Run, calibration: Images, path: Path) -> None:
    """Writes an ONNX model in eight bits (Jacob et al. 2018): weights a scale a channel, activations a range a tensor.

    Ranges are the extremes seen on the calibration images. Weights take seven of the eight bits, since two products
    of full ones overflow the 16-bit sums of processors without VNNI: results are then the same on all of them.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.array_split(calibration, -(-len(calibration) // 100)))

        def get_next(self) -> dict[str, Images] | None:
            images = next(self._batches, None)
            return None if images is None else {"images": images}

    exact = path.with_name("exact.onnx")
    export_onnx(trained, calibration, exact)
    with _quiet():
        quantize_static(
            exact,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Gemm"],
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm"],  # logits stay exact; other outputs are inputs again
                "QDQDisableWeightAdjustForInt32Bias": True,  # fails on a Gemm with a scale a channel (1.32)
            },
        )
    _save_onnx(onnx.load(path), path)


def load_onnx(path: Path, network: Any = None) -> Predict:
    """The model in a file of `export_onnx` or `export_int8`, in ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def export_safetensors(trained: Run, calibration: Images, path: Path) -> None:
    """Writes parameters and running statistics, named `params/conv0_kernel`; the config is in the metadata.

    Those of an ensemble are named `params/member0/conv0_kernel`.
    """
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in flatten_dict(trained.variables, sep="/").items()}
    save_file(arrays, path, _metadata(trained))


def load_safetensors(path: Path, network: Any = None) -> Predict:
    """The model in a file of `export_safetensors`, built anew from the config inside it unless `network` is given."""
    from flax.traverse_util import unflatten_dict
    from safetensors import safe_open

    from mnist_flax.training.state import make_network

    with safe_open(path, "numpy") as file:
        metadata = {key: json.loads(text) for key, text in file.metadata().items()}
        variables = unflatten_dict({name: file.get_tensor(name) for name in file.keys()}, sep="/")  # noqa: SIM118
    if network is None:
        configs = [config_lib.recorded(config) for config in metadata.get("members", [metadata["config"]])]
        network = make_network(configs, len(metadata["class_names"]))
    return flax_predict(network, variables)


FORMATS = {
    "stablehlo": Format("model.stablehlo", ("flatbuffers",), export_stablehlo, load_stablehlo, **_EXACT),
    "onnx": Format("model.onnx", ("onnx", "onnxruntime"), export_onnx, load_onnx, **_EXACT),
    "onnx-int8": Format("model_int8.onnx", ("onnx", "onnxruntime"), export_int8, load_onnx, **_EIGHT_BITS),
    "safetensors": Format("model.safetensors", ("safetensors",), export_safetensors, load_safetensors, **_EXACT),
}


def flax_predict(network: Any, variables: Mapping[str, Any]) -> Predict:
    """The Flax model itself, in float32, from pixels to probabilities: what every export is held against."""
    import jax

    from mnist_flax.models import cnn

    if cnn.is_built_in(network):
        network = network.clone(compute_dtype=np.dtype("float32"))
    predict = jax.jit(lambda variables, images: _probabilities(network, variables)(images))
    return lambda images: np.asarray(predict(variables, images))


def _probabilities(network: Any, variables: Mapping[str, Any]) -> Callable:
    import jax
    import jax.numpy as jnp

    from mnist_flax.models import cnn

    def probabilities(images):
        logits = network.apply(variables, cnn.scale_pixels(images)[..., None])
        return jax.nn.softmax(logits.astype(jnp.float32))

    return probabilities


def _metadata(trained: Run) -> dict[str, str]:
    """What a file says about itself, as texts: the run's config (or those of its members), the names of the classes."""
    metadata = {"config": trained.config.to_dict(), "class_names": trained.class_names}
    if trained.members:
        metadata["members"] = [config.to_dict() for config in trained.members]
    return {key: json.dumps(value) for key, value in metadata.items()}


@contextlib.contextmanager
def _failures_of(converter: str) -> Iterator[None]:
    """Raises RunError for whatever a converter raises of a network that it does not know."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {cli.reason(error)}"
        raise cli.RunError(f"{converter} cannot convert the network ({reason}): try another format") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what converters warn of: what counts is the comparison of results."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


# Checking


class Comparison(NamedTuple):
    """How an export stands beside the Flax model, on a whole split."""

    examples: int
    accuracy: float
    flax_accuracy: float
    largest_difference: float  # of a probability


def compare(exported: Predict, reference: Predict, split, batch_size: int) -> Comparison:
    """Compares two models on every example of a `datasets.Split`, in batches; the last may be smaller."""
    batches = [split.images[i : i + batch_size] for i in range(0, len(split.images), batch_size)]
    ours, theirs = (np.concatenate([predict(batch) for batch in batches]) for predict in (exported, reference))
    accuracy, flax_accuracy = (float((p.argmax(1) == split.labels).mean()) for p in (ours, theirs))
    difference = float(np.abs(ours - theirs).max())
    return Comparison(len(ours), accuracy, flax_accuracy, difference if np.isfinite(ours).all() else float("inf"))


def check_parity(comparison: Comparison, kind: Format) -> None:
    """Raises RunError for an export that does not do what the Flax model does."""
    difference, loss = comparison.largest_difference, comparison.flax_accuracy - comparison.accuracy
    if difference > kind.largest_difference or loss > kind.largest_loss:
        raise cli.RunError(
            f"the exported model differs from the Flax model, so it was not kept: probabilities by up to "
            f"{difference:.2g} (allowed: {kind.largest_difference:g}), accuracy {comparison.accuracy:.2%} instead of "
            f"{comparison.flax_accuracy:.2%} (allowed loss: {kind.largest_loss:.2%}); try another format"
        )


class Latency(NamedTuple):
    """Milliseconds a call: median and quartiles."""

    median: float
    low: float
    high: float


def latencies(models: Mapping[str, Predict], images: Images) -> dict[int, dict[str, Latency]]:
    """Milliseconds a call by batch size, then by model; the batches are made of these images."""
    return {
        batch: _latencies(models, np.resize(images, (batch, *images.shape[1:])), repeats)
        for batch, repeats in LATENCY_BATCHES.items()
    }


def _latencies(models: Mapping[str, Predict], images: Images, repeats: int) -> dict[str, Latency]:
    """Times models in turns on the same images, so that whatever else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-3, repeats):  # the first calls compile and warm up
        for name, predict in models.items():
            start = time.perf_counter()
            predict(images)
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: Latency(*np.percentile(values, (50, 25, 75)).tolist()) for name, values in times.items()}


def check_packages(name: str) -> None:
    """Raises UserError for an unknown format, or one that needs a package that is not installed."""
    if name not in FORMATS:
        raise cli.UserError(f"format {name!r} is unknown: use one of {', '.join(FORMATS)}")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise cli.UserError(f"format {name} needs {', '.join(missing)}: run pip install 'mnist_flax[export]'")


class Export(NamedTuple):
    """A finished export, beside the model that it is of."""

    name: str  # of the format
    path: Path
    comparison: Comparison
    models: dict[str, Predict]  # by name: the format's, and "Flax"


@pinned()
def export(trained: Run, splits, name: str, path: Path) -> Export:
    """Writes a run in the format `name` to a file, once that has proved itself on the test split of `splits`.

    Raises:
      UserError: a package is missing, or the file cannot be written.
      RunError: the file does not reproduce the Flax model; nothing is left behind.
    """
    from mnist_flax.models import cnn

    check_packages(name)
    kind = FORMATS[name]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent)
    except OSError as error:
        raise cli.UserError(f"{path.parent} cannot be written ({error.strerror}): choose another directory") from error
    with workplace as temporary:
        draft = Path(temporary) / kind.file_name
        kind.write(trained, calibration_images(splits.train.images), draft)
        network = None if cnn.is_built_in(trained.model) else trained.model
        models = {name: kind.load(draft, network), "Flax": flax_predict(trained.model, trained.variables)}
        comparison = compare(models[name], models["Flax"], splits.test, trained.config.eval_batch_size)
        check_parity(comparison, kind)
        files.write(path, draft.read_bytes())
    return Export(name, path, comparison, models)


def calibration_images(images: Images) -> Images:
    """About `CALIBRATION_IMAGES` of the training images, evenly spaced."""
    return images[:: -(-len(images) // CALIBRATION_IMAGES)]
