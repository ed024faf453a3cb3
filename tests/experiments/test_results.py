import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from mnist_flax.experiments.record import results


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test(pairs):
    first, second = np.array(pairs).T
    found = results.mcnemar(first, second)
    b, c = (sum(x and not y for x, y in each) for each in (pairs, [(y, x) for x, y in pairs]))
    assert (found["only_first"], found["only_second"]) == (b, c)
    tail = sum(special.comb(b + c, k, exact=True) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert found["p_value"] == pytest.approx(min(1.0, 2 * tail))


def test_scores_are_paired_by_seed_and_ensembles_share_no_run():
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 50)
    logits = random.normal(size=(2, 4, 50, 10)) + 2 * np.eye(10)[labels]
    found = results.score(*logits, labels, 2)
    right = logits.argmax(-1) == labels
    np.testing.assert_allclose(found["difference"]["values"], right.mean(-1)[0] - right.mean(-1)[1])
    assert [test["only_first"] for test in found["tests"]] == (right[0] & ~right[1]).sum(1).tolist()
    probabilities = special.softmax(logits, axis=-1)
    want = [(probabilities[0, i : i + 2].mean(0).argmax(-1) == labels).mean() for i in (0, 2)]
    np.testing.assert_allclose(found["ensemble_accuracy"]["values"], want)
    one = results.score(*logits, labels, 3)  # ensemble, whose deviation is unknown
    assert json.loads(json.dumps(one, allow_nan=False))["ensemble_accuracy"]["half_interval"] is None
