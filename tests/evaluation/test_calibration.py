import numpy as np
import pytest
from scipy.special import log_softmax

from mnist_flax.evaluation import calibration


def sample(temperature: float, count: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too sure of labels that are drawn from them."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(count, 10))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return temperature * logits, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_found(temperature):
    assert calibration.fit_temperature(*sample(temperature)) == pytest.approx(temperature, rel=0.03)


def test_at_the_threshold_few_enough_answers_are_wrong_and_not_below():
    logits, labels = sample(1.0)
    log_probabilities = log_softmax(logits, axis=1)
    confidence, right = np.exp(log_probabilities.max(1)), log_probabilities.argmax(1) == labels
    for accepted in (0.001, 0.01, 0.1):
        threshold = calibration.fit_threshold(confidence, right, accepted)
        assert np.mean(~right[confidence >= threshold]) <= accepted
        for lower in np.sort(confidence[confidence < threshold])[-200:]:
            assert np.mean(~right[confidence >= lower]) > accepted


@pytest.mark.parametrize(
    ("confidence", "right", "threshold"),
    [
        ([0.9, 0.8], [True, True], 0.8),  # all may be answered
        ([0.9, 0.8], [True, False], 0.9),
        ([0.9, 0.8], [False, True], 1.0),  # nothing may
        ([0.9, 0.9, 0.5], [True, False, True], 1.0),  # equals go together
        ([], [], 1.0),
    ],
)
def test_thresholds_of_small_samples(confidence, right, threshold):
    assert calibration.fit_threshold(np.array(confidence), np.array(right, bool)) == threshold


def test_answers():
    digits, answered = calibration.answers(np.log([[0.2, 0.8], [0.95, 0.05]]), 0.9)
    assert digits.tolist() == [1, 0] and answered.tolist() == [False, True]
