"""A trained run, scored on a whole split of its dataset: as it is, under corruptions, or for its report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_flax.data import datasets
from mnist_flax.evaluation import metrics, report, robustness, robustness_figures
from mnist_flax.inference import classifier, tta
from mnist_flax.inference.predictor import make_logits
from mnist_flax.inference.run import Run, load_run
from mnist_flax.models import cnn
from mnist_flax.runtime.cli import UserError
from mnist_flax.training import scoring


def load_split(trained: Run, name: str) -> datasets.Split:
    """The split "train", "validation" or "test" of a run's dataset.

    Raises:
      UserError: the run has no such examples, or the dataset cannot be used.
    """
    if name not in ("train", "validation", "test"):
        raise UserError(f"split={name!r} is unknown: use 'train', 'validation' or 'test'")
    split = getattr(datasets.load(trained.config), name)
    if not len(split.labels):
        raise UserError(f"the run has no {name} examples: choose another split")
    return split


def evaluate(trained: Run, split: str, checkpoint: str, views: int = 1) -> dict[str, Any]:
    """The content of evaluation_<split>.json: where it is from, and `metrics.evaluate_logits`.

    Args:
      checkpoint: which one the run was loaded from, as recorded.
      views: copies of each image, slightly moved, whose mean probabilities are scored; 1 is the image itself.

    Raises:
      UserError: the run has no such examples, the dataset cannot be used, or views move nothing.
    """
    examples = load_split(trained, split)
    model = trained.model if views == 1 else tta.make_tta(trained.model, trained.config, views)
    logits = scoring.make_logits(model, trained.config.eval_batch_size)(trained.variables, examples)
    which = {"dataset": trained.config.dataset, "split": split, "checkpoint": checkpoint}
    return which | metrics.evaluate_logits(logits, examples.labels)


def evaluate_corruptions(trained: Run, split: str, checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of robustness.json, and its figures by name.

    Computed in float32; the temperature is that of the run's validation examples, where there are any.

    Raises:
      UserError: the run has no such examples, or the dataset cannot be used.
    """
    examples = load_split(trained, split)
    logits_of = make_logits(trained)
    fitted = classifier.load_calibration(trained, logits_of)
    measured = robustness.measure(logits_of, examples)
    found = robustness.summarize(measured, examples.labels, fitted.temperature if fitted else None)
    results = {"dataset": trained.config.dataset, "split": split, "checkpoint": checkpoint} | found
    return results, robustness_figures.draw(results, examples.images)


def write_report(directory: Path, summary: Mapping[str, Any]) -> Path:
    """Scores the run in a directory on its test split, and writes figures and report.html; gives the page's path.

    Raises:
      UserError: there is no such run, or the dataset cannot be used.
      RunError: its checkpoint cannot be read.
    """
    trained = load_run(directory)
    test = load_split(trained, "test")
    logits = scoring.make_logits(trained.model, trained.config.eval_batch_size)(trained.variables, test)
    kernel = cnn.first_kernel(trained.variables)
    pictures = report.draw(directory, test.images, test.labels, logits, kernel, trained.class_names)
    return report.write(directory, summary, metrics.evaluate_logits(logits, test.labels), trained.class_names, pictures)
