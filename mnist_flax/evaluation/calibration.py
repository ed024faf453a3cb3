"""How far a model's probabilities can be trusted: temperature and threshold, from validation data."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mnist_flax.evaluation import metrics

ACCEPTED_ERROR = 0.002  # share of errors among the validation digits that are answered


class Calibration(NamedTuple):
    temperature: float  # logits are divided by it before the softmax
    threshold: float  # least probability of an answer; below, the answer is "?"


def fit(logits: metrics.Logits, labels: metrics.Labels) -> Calibration:
    """Temperature and threshold from a validation split: `fit_temperature`, then `fit_threshold`."""
    temperature = fit_temperature(logits, labels)
    log_probabilities = metrics.log_softmax(logits / temperature)
    right = log_probabilities.argmax(axis=1) == labels
    return Calibration(temperature, fit_threshold(np.exp(log_probabilities.max(axis=1)), right))


def fit_temperature(logits: metrics.Logits, labels: metrics.Labels) -> float:
    """The temperature with the least negative log-likelihood (Guo et al. 2017), within [0.1, 10].

    Raises ValueError for logits and labels that do not match, or none.
    """
    metrics.check_logits(logits, labels)
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(metrics.negative_log_likelihood(logits / np.exp(log_temperature), labels).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.1), np.log(10.0)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def fit_threshold(
    confidence: Float[np.ndarray, " examples"],
    right: Bool[np.ndarray, " examples"],
    accepted_error: float = ACCEPTED_ERROR,
) -> float:
    """The smallest threshold at which at most `accepted_error` of the examples that reach it are wrong.

    The selective classifier of Geifman and El-Yaniv 2017, without their bound: where all errors are below it, the
    threshold is the confidence of the next example. 1 where even the surest examples are wrong too often.
    """
    order = np.argsort(-confidence, kind="stable")
    errors = np.cumsum(~right[order])
    share = errors / np.arange(1, len(order) + 1)
    surest_first = confidence[order]
    ends_tie = np.append(surest_first[1:] < surest_first[:-1], True)  # a threshold cannot part equals
    fine = np.flatnonzero((share <= accepted_error) & ends_tie)
    return float(surest_first[fine[-1]]) if len(fine) else 1.0


def answers(
    log_probabilities: Float[np.ndarray, "digits classes"], threshold: float
) -> tuple[Int[np.ndarray, " digits"], Bool[np.ndarray, " digits"]]:
    """The likeliest class of each digit, and whether it is likely enough to be an answer."""
    return log_probabilities.argmax(axis=1), np.exp(log_probabilities.max(axis=1)) >= threshold
