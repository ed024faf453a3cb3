"""What a classifier's logits on a split are worth: pure NumPy functions of logits and labels, in float64."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

CALIBRATION_BINS = 15  # as in Guo et al. 2017, so that the error can be compared with theirs

Logits = Float[np.ndarray, "examples classes"]
Labels = Int[np.ndarray, " examples"]


def evaluate_logits(logits: Logits, labels: Labels) -> dict[str, Any]:
    """All metrics of one split, ready for JSON.

    Accuracies, precisions and recalls are shares of 1; `accuracy_interval` is the 95 % Wilson interval;
    `negative_log_likelihood` is in nats an example; `confusion` counts examples, a row a label and a column a
    prediction; `per_class` has an entry a class, where what cannot be computed (the precision of a class that
    is never predicted, the recall of one with no example) is None, as are the means of an empty
    `reliability` bin. Raises ValueError for no example, shapes that do not match, a label out of range or a
    logit that is not finite.
    """
    check_logits(logits, labels)
    confusion = confusion_matrix(logits, labels)
    examples, correct = len(labels), int(np.trace(confusion))
    precision, recall = precision_and_recall(confusion)
    counts = confusion.sum(axis=1)
    return {
        "examples": examples,
        "errors": examples - correct,
        "accuracy": correct / examples,
        "accuracy_interval": list(wilson_interval(correct, examples)),
        **evaluate_calibration(logits, labels),
        "per_class": [
            {
                "class": i,
                "examples": int(counts[i]),
                "precision": none_if_nan(precision[i]),
                "recall": none_if_nan(recall[i]),
            }
            for i in range(len(confusion))
        ],
        "confusion": confusion.tolist(),
    }


def evaluate_calibration(logits: Logits, labels: Labels) -> dict[str, Any]:
    """What `evaluate_logits` says of probabilities: their loss, how far they are off, and `reliability_bins`."""
    bins = reliability_bins(logits, labels)
    return {
        "negative_log_likelihood": float(negative_log_likelihood(logits, labels).mean()),
        "expected_calibration_error": calibration_error(bins),
        "reliability": {name: [none_if_nan(x) for x in values.tolist()] for name, values in bins.items()},
    }


def check_logits(logits: Logits, labels: Labels) -> None:
    """Raises ValueError, with the reason, for logits and labels that no metric can be computed from."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not match")
    if not len(labels):
        raise ValueError("there is no example to evaluate")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()} with {logits.shape[1]} classes")
    if not np.isfinite(logits).all():
        raise ValueError("some logits are not finite")


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): sound near 1, where accuracies are."""
    share, z = successes / trials, 1.959963984540054
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def log_softmax(logits: Logits) -> Float[np.ndarray, "examples classes"]:
    """Log probabilities; shifted by the largest logit so that nothing overflows."""
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def ensemble_logits(logits: Float[np.ndarray, "runs examples classes"]) -> Logits:
    """Logarithm of the mean over runs of their class probabilities, in float64."""
    return np.logaddexp.reduce([log_softmax(each) for each in logits]) - math.log(len(logits))


def ensemble_accuracies(
    logits: Float[np.ndarray, "runs examples classes"], labels: Labels, size: int
) -> Float[np.ndarray, " ensembles"]:
    """Accuracy of each of the disjoint ensembles of `size` runs: the first `size`, the next `size` and so on.

    Runs that are left over at the end take no part. Ensembles that share no run are independent draws, so that their
    mean and standard deviation are those of an ensemble of freshly trained runs; the deviation over overlapping ones
    would be too small.

    Raises:
      ValueError: `size` is not from 1 to the number of runs, or see `check_logits`.
    """
    if not 1 <= size <= len(logits):
        raise ValueError(f"there are no ensembles of {size} in {len(logits)} runs")
    ensembles = [ensemble_logits(logits[i : i + size]) for i in range(0, len(logits) - size + 1, size)]
    for each in ensembles:
        check_logits(each, labels)
    return np.array([(each.argmax(axis=1) == labels).mean() for each in ensembles])


def negative_log_likelihood(logits: Logits, labels: Labels) -> Float[np.ndarray, " examples"]:
    """Cross-entropy of each example in nats."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def confusion_matrix(logits: Logits, labels: Labels) -> Int[np.ndarray, "classes classes"]:
    """Number of examples by label (row) and prediction (column)."""
    classes = logits.shape[1]
    cells = labels.astype(np.int64) * classes + logits.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def precision_and_recall(
    confusion: Int[np.ndarray, "classes classes"],
) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, " classes"]]:
    """Of each class: the share of its predictions that are right, and of its examples that are found.

    NaN for a class that is never predicted, or has no example.
    """
    right = np.diag(confusion).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return right / confusion.sum(axis=0), right / confusion.sum(axis=1)


def reliability_bins(logits: Logits, labels: Labels) -> dict[str, np.ndarray]:
    """Examples by confidence, the probability of the prediction, in `CALIBRATION_BINS` equal bins (lower, upper].

    Arrays [bins]: `lower` and `upper` bounds, `count`, mean `confidence` and `accuracy` (NaN where empty).
    """
    log_probabilities = log_softmax(logits)
    confidence = np.exp(log_probabilities.max(axis=1))
    right = log_probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        return {
            "lower": edges[:-1],
            "upper": edges[1:],
            "count": count,
            "confidence": np.bincount(place, confidence, CALIBRATION_BINS) / count,
            "accuracy": np.bincount(place, right, CALIBRATION_BINS) / count,
        }


def calibration_error(bins: dict[str, np.ndarray]) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over `reliability_bins`.

    Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017, equation 3.
    """
    gaps = np.abs(bins["accuracy"] - bins["confidence"])
    return float(np.nansum(gaps * bins["count"]) / bins["count"].sum())


def risk_coverage(logits: Logits, labels: Labels) -> Float[np.ndarray, " examples"]:
    """Error rate among the 1, 2, ..., all most confident examples: the risk of answering only that many.

    Geifman and El-Yaniv 2017; its mean is the area under the curve of risk against coverage. Examples of equal
    confidence count as their mean, in whatever order they come.
    """
    check_logits(logits, labels)
    log_probabilities = log_softmax(logits)
    _, ties = np.unique(-log_probabilities.max(axis=1), return_inverse=True)
    wrong = log_probabilities.argmax(axis=1) != labels
    errors = (np.bincount(ties, wrong) / np.bincount(ties))[np.sort(ties)]
    return np.cumsum(errors) / np.arange(1, len(errors) + 1)
