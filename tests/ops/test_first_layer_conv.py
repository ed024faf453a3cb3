"""The implementation "mixed", whose first layer is a product of matrices, against NumPy in float64."""

import jax.numpy as jnp
import pytest
from hypothesis import example, given

from tests.ops.test_conv import CUT, cases, errors, examples, layer, separate


@pytest.mark.parametrize("function", [layer, separate])
@examples(max_examples=6)
@given(case=cases(most_channels=1))
@example(CUT)
def test_mixed_agrees_in_float64(function, case):
    """With one channel; with more it is lax."""
    assert max(errors(case, function, "mixed", jnp.float64)) < 1e-12


def test_mixed_agrees_in_bfloat16():
    # Maxima are of numbers rounded to bfloat16, as in lax: some tie, and another one has the gradient.
    output, *gradients = errors(CUT, layer, "mixed", jnp.bfloat16)
    assert output < 1e-2
    assert max(gradients) < 0.1
