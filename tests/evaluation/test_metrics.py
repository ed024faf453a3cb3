import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.evaluation import metrics


def make(n: int, seed: int = 0, scale: float = 3.0, skill: float = 4.0, classes: int = 10):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) * scale
    logits[np.arange(n), labels] += skill
    return logits.astype(np.float32), labels


cases = st.builds(make, st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([0.1, 3.0, 50.0]), st.floats(-3, 9))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_agrees_with_scikit_learn(case):
    logits, labels = case
    result = metrics.evaluate_logits(logits, labels)
    predictions = logits.argmax(1)
    assert result["examples"] == len(labels)
    assert result["errors"] == (predictions != labels).sum()
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    want = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(10))
    np.testing.assert_array_equal(result["confusion"], want)
    precision, recall, _, support = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(10), zero_division=np.nan
    )
    nan_if_none = [
        [np.nan if row[name] is None else row[name] for row in result["per_class"]] for name in ("precision", "recall")
    ]
    np.testing.assert_allclose(nan_if_none, [precision, recall])
    assert [row["examples"] for row in result["per_class"]] == support.tolist()
    assert [row["class"] for row in result["per_class"]] == list(range(10))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_likelihood_is_scipys(case):
    logits, labels = case
    want = -scipy.special.log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean()
    assert metrics.evaluate_logits(logits, labels)["negative_log_likelihood"] == pytest.approx(want, rel=1e-12)


def test_likelihood_of_huge_logits_is_finite_and_exact():
    logits = np.array([[1e30, 0.0], [0.0, -3e4], [20.0, 0.0]], np.float32)
    got = metrics.negative_log_likelihood(logits, np.array([1, 0, 0]))
    np.testing.assert_allclose(got[:2], [1e30, 0.0], rtol=1e-6)
    assert got[2] == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)  # float32 would say 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20_000), st.floats(0, 1))
def test_wilson_interval_is_scipys(trials, share):
    successes = round(share * trials)
    want = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert metrics.wilson_interval(successes, trials) == pytest.approx((want.low, want.high), abs=1e-12)


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    truth, trials = 0.995, 10_000
    right = np.random.default_rng(0).binomial(trials, truth, 2_000)
    covered = [low <= truth <= high for low, high in (metrics.wilson_interval(int(k), trials) for k in right)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_calibration_error_is_the_definition(case):
    """Guo et al., equation 3, by one loop over the bins."""
    logits, labels = case
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    error, counts = 0.0, []
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        counts.append(int(inside.sum()))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    result = metrics.evaluate_logits(logits, labels)
    assert result["expected_calibration_error"] == pytest.approx(error, abs=1e-12)
    assert result["reliability"]["count"] == counts
    empty = [x is None for x in result["reliability"]["accuracy"]]
    assert empty == [c == 0 for c in counts]


def test_calibration_error_of_known_cases():
    labels = np.zeros(1_000, np.int64)
    certain = np.tile(np.array([[100.0, 0.0]], np.float32), (1_000, 1))
    assert metrics.evaluate_logits(certain, labels)["expected_calibration_error"] == pytest.approx(0, abs=1e-9)
    assert metrics.evaluate_logits(certain, labels + 1)["expected_calibration_error"] == pytest.approx(1, abs=1e-9)
    # Said 0.9, right in 700 of 1,000: off by 0.2.
    ninety = np.tile(np.log(np.array([[0.9, 0.1]], np.float32)), (1_000, 1))
    labels[:300] = 1
    assert metrics.evaluate_logits(ninety, labels)["expected_calibration_error"] == pytest.approx(0.2, abs=1e-6)


def test_scaling_logits_leaves_accuracy_and_moves_calibration():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 10)).astype(np.float32) * 2
    labels = np.array([rng.choice(10, p=p) for p in scipy.special.softmax(logits.astype(np.float64), axis=1)])
    calibrated = metrics.evaluate_logits(logits, labels)
    boastful = metrics.evaluate_logits(3 * logits, labels)
    assert calibrated["expected_calibration_error"] < 0.015 < 0.1 < boastful["expected_calibration_error"]
    assert calibrated["confusion"] == boastful["confusion"]


def test_result_is_json_without_nan():
    logits, labels = make(5, classes=10)
    result = metrics.evaluate_logits(logits, labels)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    missing = set(range(10)) - set(labels.tolist())
    assert missing and all(result["per_class"][i]["recall"] is None for i in missing)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 10), np.float32), np.zeros(0, int), "no example"),
        (np.zeros((3, 10), np.float32), np.zeros(4, int), "do not match"),
        (np.zeros((3, 10), np.float32), np.array([0, 10, 1]), "from 0 to 10 with 10 classes"),
        (np.zeros((3, 10), np.float32), np.array([0, -1, 1]), "from -1"),
        (np.full((3, 10), np.nan, np.float32), np.zeros(3, int), "not finite"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate_logits(logits, labels)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_ensembles_average_probabilities_and_share_no_run(runs, examples, seed, data):
    size = data.draw(st.integers(1, runs))
    cases = [make(examples, seed + i) for i in range(runs)]
    logits, labels = np.stack([case[0] for case in cases]), cases[0][1]
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(metrics.ensemble_logits(logits), np.log(probabilities.mean(0)), rtol=1e-12, atol=1e-12)
    want = [(probabilities[size * i : size * (i + 1)].mean(0).argmax(1) == labels).mean() for i in range(runs // size)]
    np.testing.assert_array_equal(metrics.ensemble_accuracies(logits, labels, size), want)


def test_probabilities_are_averaged_not_logits():
    logits = np.array([[[9.0, 0.0]], [[0.0, 10.0]], [[0.4, 0.0]]])
    assert metrics.ensemble_logits(logits).argmax() == 0 and logits.mean(0).argmax() == 1


def test_an_ensemble_of_huge_logits_is_finite():
    logits = np.array([[[1e30, 0.0]], [[0.0, 1e30]]], np.float32)
    np.testing.assert_allclose(metrics.ensemble_logits(logits), np.log([[0.5, 0.5]]))
    np.testing.assert_allclose(metrics.ensemble_logits(logits[:1]), [[0.0, -1e30]], rtol=1e-6)


@pytest.mark.parametrize("size", [0, 4, -1])
def test_ensembles_that_do_not_exist_are_refused(size):
    with pytest.raises(ValueError, match="no ensembles"):
        metrics.ensemble_accuracies(np.zeros((3, 2, 10)), np.zeros(2, int), size)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_risk_coverage_is_the_error_rate_among_the_most_confident(case):
    logits, labels = case
    risk = metrics.risk_coverage(logits, labels)
    log_probabilities = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    wrong = log_probabilities.argmax(1) != labels
    order = sorted(range(len(labels)), key=lambda i: -log_probabilities[i].max())
    confidences = [log_probabilities[i].max() for i in order]
    assert risk[-1] == pytest.approx(wrong.mean())
    for count in range(1, len(order)):
        if confidences[count] < confidences[count - 1] - 1e-9:  # no tie across the cut
            assert risk[count - 1] == pytest.approx(wrong[order[:count]].mean())


def test_risk_coverage_of_ties_and_of_none_wrong():
    logits, labels = np.array([[2.0, 0.0], [0.0, 2.0], [9.0, 0.0]]), np.array([0, 0, 0])
    np.testing.assert_allclose(metrics.risk_coverage(logits, labels), [0, 0.25, 1 / 3])
    np.testing.assert_allclose(metrics.risk_coverage(logits[[1, 2, 0]], labels), [0, 0.25, 1 / 3])
    np.testing.assert_array_equal(metrics.risk_coverage(logits, np.array([0, 1, 0])), 0)
