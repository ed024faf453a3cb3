"""A trained model as a function from digits to probabilities that can be trusted, of any number of digits."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from mnist_flax.evaluation import calibration, metrics
from mnist_flax.evaluation.calibration import Calibration
from mnist_flax.inference.run import Run
from mnist_flax.runtime import cli, run_dir
from mnist_flax.runtime.run_dir import write_json
from mnist_flax.runtime.settings import pinned

DIGITS = tuple("0123456789")
DEFAULT_THRESHOLD = 0.9  # where a run cannot be calibrated

Images = UInt8[np.ndarray, "digits 28 28"]
Classify = Callable[[Images], Float[np.ndarray, "digits classes"]]


class CalibratedClassifier(NamedTuple):
    """A run that is ready to read digits."""

    run: Run
    log_probabilities: Classify  # calibrated
    temperature: float  # that they were calibrated with
    threshold: float  # least probability of an answer


def load_classifier(trained: Run, threshold: float | None = None) -> CalibratedClassifier:
    """A run's model, with the threshold of its answers from calibration unless one is given.

    Logs it where the run cannot be calibrated and no `threshold` is given.

    Raises:
      UserError: it does not read digits, or its calibration is damaged.
    """
    from mnist_flax.data import prepare
    from mnist_flax.inference import predictor

    check_reads_digits(trained)
    logits = predictor.make_logits(trained)
    fitted = load_calibration(trained, logits)
    if fitted is None:
        if threshold is None:
            why = "its validation examples are not available"
            remedy = f"name their place with {prepare.place_option()}, or "
            if trained.config.validation_examples == 0:
                why, remedy = "no examples were held out from its training", ""
            logging.info(
                f"{trained.directory} is not calibrated, since {why}: answers below {DEFAULT_THRESHOLD:.0%} are '?'; "
                f"{remedy}set {cli.option('threshold', 'P')}"
            )
        fitted = Calibration(1.0, DEFAULT_THRESHOLD)
    calibrated = make_log_probabilities(logits, fitted.temperature)
    return CalibratedClassifier(
        trained, calibrated, fitted.temperature, fitted.threshold if threshold is None else threshold
    )


def make_log_probabilities(logits: Classify, temperature: float) -> Classify:
    """Calibrated log probabilities, in float64."""
    return lambda images: metrics.log_softmax(logits(images) / temperature)


def check_reads_digits(run: Run) -> None:
    """Raises UserError for a run whose classes are no digits."""
    if run.class_names != DIGITS:
        raise cli.UserError(
            f"{run.directory} was trained on {run.config.dataset}, not on digits: "
            "name a run of config.dataset=mnist or digits"
        )


@pinned()
def load_calibration(run: Run, logits: Classify) -> Calibration | None:
    """Temperature and threshold of a run's model, from its validation examples.

    They are kept in the run directory as calibration.json, with a digest of the parameters that they belong to, and
    fitted when that is not there. None if they must be fitted and the validation examples are not at hand; nothing is
    downloaded for it.

    Raises:
      UserError: the dataset or calibration.json is damaged.
    """
    path = run.directory / "calibration.json"
    digest = _digest(run.variables)
    if path.exists():
        recorded = _read(path)
        if recorded["digest"] == digest and recorded["accepted_error"] == calibration.ACCEPTED_ERROR:
            return Calibration(recorded["temperature"], recorded["threshold"])
    splits = splits_at_hand(run) if run.config.validation_examples != 0 else None
    if splits is None:
        return None
    validation = splits.validation
    scores = logits(validation.images)
    fitted = calibration.fit(scores, validation.labels)
    answer, accepted = calibration.answers(metrics.log_softmax(scores / fitted.temperature), fitted.threshold)
    record = {
        **fitted._asdict(),
        "accepted_error": calibration.ACCEPTED_ERROR,
        "validation_examples": len(accepted),
        "answered": int(accepted.sum()),
        "errors": int((accepted & (answer != validation.labels)).sum()),
        "digest": digest,
    }
    with contextlib.suppress(OSError):  # a run that may only be read is calibrated anew each time
        write_json(path, record)
    return fitted


def _read(path) -> dict[str, Any]:
    try:
        recorded = run_dir.read_json(path)
        numbers = {name: float(recorded[name]) for name in ("temperature", "threshold", "accepted_error")}
        if not (0 < numbers["temperature"] < np.inf and 0 <= numbers["threshold"] <= 1):
            raise ValueError("out of range")
        return {"digest": str(recorded["digest"]), **numbers}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise cli.UserError(f"{path} is damaged: delete it, and it will be made anew") from error


def splits_at_hand(run: Run):
    """The run's `datasets.Splits`; None if they are not at hand: nothing is downloaded for it.

    Raises UserError if the dataset is damaged, or the embedded one cannot be prepared.
    """
    from mnist_flax.data import datasets, prepare

    config = run.config
    if config.dataset != "digits" and not prepare.is_prepared(config.dataset, config.data_dir):
        return None
    return datasets.load(config)


def _digest(variables: Any) -> str:
    import jax

    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
