"""The public API: `import mnist_flax as mf`. The commands make these calls, and show what comes of them.

Nothing here prints, sets signals, changes global state or exits. What is wrong with a call is a `UserError`, what goes
wrong in a run a `RunError`, each with one line that says what to do.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from mnist_flax.data import datasets
from mnist_flax.data.idx import IMAGE_SIZE
from mnist_flax.evaluation import metrics
from mnist_flax.inference import classifier, evaluate, formats, predictor
from mnist_flax.inference import run as run_lib
from mnist_flax.ocr import page_reader
from mnist_flax.runtime import cli, metrics_log, recipes, run_dir
from mnist_flax.runtime import config as config_lib
from mnist_flax.training import train as train_lib


def get_config(recipe: str, **overrides: Any) -> ConfigDict:
    """Returns the config of a recipe, checked.

    Args:
      recipe: a Python file with `get_config()`, or "FILE:ARGUMENT" for `get_config(argument)`; `configs/NAME.py` names
        a recipe of the project from any directory, unless such a file is there.
      overrides: values of fields, groups as dictionaries: `num_epochs=5, model={"channels": (8, 16)}`. Fields that
        refer to them follow.

    Raises:
      UserError: there is no such recipe, it fails, or a field is unknown, of the wrong type or out of range.
    """
    config = recipes.load(recipe)
    config_lib.override(config, overrides)
    config_lib.check_config(config)
    return config


def train(config: ConfigDict, workdir: str | Path | None = None) -> "Run":
    """Trains a run and returns it; resumes an unfinished run, and just returns a finished one.

    Args:
      config: from `get_config`, or any ConfigDict with the fields of `configs/default.py`.
      workdir: run directory; a new one under `runs/` if not given.

    Raises:
      UserError: the config, the dataset or the directory cannot be used.
      RunError: training diverged, or a file could not be written.
    """
    cli.check_path(f"workdir={workdir}", workdir or "")
    directory = run_dir.new_directory(config.dataset) if workdir is None else Path(workdir)
    train_lib.train(config, directory)
    return load(directory)


def load(directory: str | Path, checkpoint: str | None = None) -> "Run":
    """Reads a run, or an ensemble, back from its directory.

    Args:
      directory: run directory with at least one checkpoint.
      checkpoint: "last" or "best" on validation; by default the one that the run's config selects.

    Raises:
      UserError: there is no such run, or no such checkpoint.
      RunError: its checkpoint cannot be read.
    """
    if checkpoint not in (None, "last", "best"):
        raise cli.UserError(f"checkpoint={checkpoint!r} is unknown: use 'last' or 'best'")
    return Run(run_lib.load_run(directory, checkpoint), checkpoint)


class Run:
    """A trained run, or an ensemble of runs, as a model that is ready for use; made by `train` and `load`.

    `run.model.apply(run.variables, images)` is plain Flax, for everything not foreseen here.
    """

    def __init__(self, trained: run_lib.Run, checkpoint: str | None = None):
        self._trained = trained
        self._checkpoint = checkpoint or trained.config.checkpoint.select
        self._classifiers: dict[float | None, classifier.CalibratedClassifier] = {}  # by threshold

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, dataset={self.config.dataset!r})"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self._trained.directory

    @property
    def config(self) -> ConfigDict:
        """The config that the run recorded; of an ensemble, that of its first member."""
        return self._trained.config

    @property
    def model(self) -> Any:
        """The Flax module; of an ensemble, an `Ensemble`, which is applied likewise."""
        return self._trained.model

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"}: what `model.apply` takes; averages (EMA) where the run has any."""
        return self._trained.variables

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self._trained.class_names

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json; None until the run is finished."""
        return run_dir.read_summary(self.directory)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, one an epoch and split: step, epoch, split, loss, accuracy, ..."""
        return metrics_log.read_records(self.directory / "metrics.jsonl")

    def logits(self, images: np.ndarray) -> Float[np.ndarray, "n classes"]:
        """Returns logits in float32, computed in float32.

        Args:
          images: uint8, or float within [0, 1], of shape [n, height, width] or [n, height, width, channels];
            255 and 1.0 are ink.

        Raises:
          UserError: images of another type, range or shape.
        """
        return self._logits(predictor.check_images(images, IMAGE_SIZE))

    def predict(self, images: np.ndarray) -> Float[np.ndarray, "n classes"]:
        """Returns class probabilities in float32: the softmax of `logits`, which takes the same images."""
        probabilities: np.ndarray = np.exp(metrics.log_softmax(self.logits(images)))
        return probabilities.astype(np.float32)

    def features(self, images: np.ndarray) -> dict[str, Float[np.ndarray, "n ..."]]:
        """Returns what each layer makes of images, {layer name: activations}, in the order of computation.

        Convolutional layers give [n, height, width, channels], after ReLU and pooling; dense ones [n, features]. Of an
        ensemble, the layers of its first member. Images are those of `logits`.
        """
        return self._features(predictor.check_images(images, IMAGE_SIZE))

    @cached_property
    def _logits(self) -> Callable[[predictor.Images], Float[np.ndarray, "n classes"]]:
        return predictor.make_logits(self._trained)

    @cached_property
    def _features(self) -> Callable[[predictor.Images], dict[str, Float[np.ndarray, "n ..."]]]:
        return predictor.make_features(self._trained)

    def evaluate(self, split: str = "test", views: int = 1) -> dict[str, Any]:
        """Scores a whole split; returns what `python -m mnist_flax.evaluate` writes to evaluation_<split>.json.

        Args:
          split: "train", "validation" or "test".
          views: copies of each image, slightly moved, whose mean probabilities are scored; 1 is the image itself.

        Raises:
          UserError: the run has no such examples, or the dataset cannot be used.
        """
        return evaluate.evaluate(self._trained, split, self._checkpoint, views)

    def read(
        self, file: str | Path, layout: page_reader.Layout = "digit", threshold: float | None = None
    ) -> dict[str, Any]:
        """Reads a picture; returns the object that `python -m mnist_flax.predict --json` prints. Needs `predict`.

        Args:
          file: path of an image.
          layout: "digit", "line" or "page".
          threshold: least calibrated probability of an answer, below which it is "?"; by default from calibration.

        Raises:
          UserError: the extra `predict` is not installed, the picture cannot be read, or the run reads no digits.
        """
        page_reader.require_packages()
        if layout not in page_reader.LAYOUTS:
            raise cli.UserError(f"layout={layout!r} is unknown: use one of {', '.join(page_reader.LAYOUTS)}")
        from mnist_flax.ocr import read_files

        if threshold not in self._classifiers:
            self._classifiers[threshold] = classifier.load_classifier(self._trained, threshold)
        ((item, reading),) = read_files.read_files([read_files.Item(str(file))], self._classifiers[threshold], layout)
        if reading is None:
            raise cli.UserError(item.error)
        return read_files.to_json(item, layout, reading)

    def export(self, name: str, path: str | Path) -> Path:
        """Writes the model to a file, once that file has reproduced the model's predictions on the test split.

        Args:
          name: "stablehlo", "onnx", "onnx-int8" or "safetensors".
          path: file to write.

        Raises:
          UserError: an unknown format, a package that is missing, or a path that cannot be written.
          RunError: the file does not reproduce the model; nothing is left behind.
        """
        formats.check_packages(name)
        return formats.export(self._trained, datasets.load(self.config), name, Path(path)).path
