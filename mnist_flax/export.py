"""Exports a trained model: `python -m mnist_flax.export RUN --format=stablehlo|onnx|onnx-int8|safetensors`.

The file appears under its name only after its own runtime has loaded it back and agreed with the Flax model on the
whole test split.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import signal
import sys
from pathlib import Path

from absl import flags

from mnist_flax.inference import formats, model_flags
from mnist_flax.runtime import cli
from mnist_flax.runtime.terminal import console, table

flags.adopt_module_key_flags(model_flags)
_FORMAT = flags.DEFINE_enum("format", None, list(formats.FORMATS), "what to write.")
_OUTPUT = flags.DEFINE_string("output", None, "directory to write to; RUN/export if not given.")


def print_export(export: formats.Export, latencies: dict[int, dict[str, formats.Latency]]) -> None:
    """Prints what was written, and how it stands beside the Flax model."""
    name, comparison = export.name, export.comparison
    shown = table("", "accuracy", *(f"ms at batch {batch}" for batch in latencies))
    for model, accuracy in ((name, comparison.accuracy), ("Flax", comparison.flax_accuracy)):
        spans = (models[model] for models in latencies.values())
        shown.add_row(model, f"{accuracy:.2%}", *(f"{ms.median:.3g} ({ms.low:.3g} to {ms.high:.3g})" for ms in spans))
    console.print(shown)
    console.print(f"on all {comparison.examples:,} test examples, on the CPU; times: median (quartiles), in turns")
    console.print(f"largest difference of a probability {comparison.largest_difference:.2g}")
    console.print(f"written to {export.path} ({export.path.stat().st_size:,} bytes)")


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m mnist_flax.export RUN --format=onnx")
    if _FORMAT.value is None:
        raise cli.UserError(f"choose what to write: --format={'|'.join(formats.FORMATS)}")
    formats.check_packages(_FORMAT.value)
    directory = Path(_OUTPUT.value or Path(argv[1]) / "export")
    if directory.exists() and not directory.is_dir():
        raise cli.UserError(f"--output={directory} is a file: name a directory")
    import jax

    jax.config.update("jax_platforms", "cpu")  # float32 is exact there: the same file and check on every machine
    from mnist_flax.data import datasets
    from mnist_flax.runtime import devices

    devices.keep_compiled_programs()
    trained = model_flags.load(argv[1])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no draft is left behind
    path = directory / formats.FORMATS[_FORMAT.value].file_name
    splits = datasets.load(trained.config)
    export = formats.export(trained, splits, _FORMAT.value, path)
    print_export(export, formats.latencies(export.models, splits.test.images))


if __name__ == "__main__":
    cli.run(main)
