"""Layers as matrix products, against NumPy in float64, and the form in which bfloat16 is multiplied."""

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mnist_flax.ops import conv
from tests.ops.test_conv import CLASSIC, CUT, MATRICES, UNPOOLED, cases, errors, examples, layer, separate

tile_sizes = st.sampled_from([1, 2**10, 2**22])  # bytes: a row of an example; a few; everything


@examples(max_examples=6)
@given(case=cases(), tile_bytes=tile_sizes)
@example(CLASSIC, 1)
@example(UNPOOLED, 1)
@example(CUT, 2**22)
def test_layer_agrees_in_float64(case, tile_bytes):
    assert max(errors(case, layer, "matmul", jnp.float64, tile_bytes)) < 1e-12


@examples(max_examples=4)
@given(case=cases(), tile_bytes=tile_sizes)
def test_convolution_and_pooling_agree_in_float64(case, tile_bytes):
    assert max(errors(case, separate, "matmul", jnp.float64, tile_bytes)) < 1e-12


@examples(max_examples=3)
@given(case=cases(), tile_bytes=tile_sizes)
@example(CLASSIC, 2**22)
def test_layer_agrees_in_float32(case, tile_bytes):
    assert max(errors(case, layer, "matmul", jnp.float32, tile_bytes)) < 1e-5


@examples(max_examples=2)
@given(case=cases(), tile_bytes=tile_sizes)
@example(CLASSIC, 1)
@example(CUT, 2**22)
def test_layer_agrees_in_bfloat16(case, tile_bytes):
    # Products accumulate in float32: what is left is the rounding of results, 2^-9 each, and of inner gradients.
    assert max(errors(case, layer, "matmul", jnp.bfloat16, tile_bytes)) < 1e-2


def test_large_batches_are_tiled_too():
    assert max(errors(((1000, 7, 7, 2), 3, 3, ("SAME", 2), 0), layer, "matmul", jnp.float32, 2**15)) < 1e-5


def forms_of_products(function, *arguments):
    """Of all products of the compiled function: types and layouts of the operands, and the axes that are contracted."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = []
    kinds = dict(re.findall(r"%(\S+) = (\w+\[[\d,]*\]\S*)", text))
    for line in text.splitlines():
        if match := re.search(r" dot\(%([\w.-]+), %([\w.-]+)\), lhs_contr.*?={(\d)}.*?={(\d)}", line):
            left, right = (re.sub(r"\[.*\]", "", kinds[name]) for name in match.groups()[:2])
            found.append((left, right, *match.groups()[2:]))
    return found


@pytest.mark.parametrize("batch", [8, 4096])
def test_bfloat16_products_have_the_fast_form(batch):
    """a b or a b^T of row-major operands in bfloat16; any other form runs in float32, several times slower."""
    x = jnp.zeros((batch, 8, 8, 3), jnp.bfloat16)
    first, second, last = jnp.zeros((3, 3, 3, 16)), jnp.zeros((3, 3, 16, 8)), jnp.zeros((2 * 2 * 8, 32))

    def network(first, second, last):
        y = layer(x, first, jnp.zeros(16), "matmul", ("SAME", 2))
        y = layer(y, second, jnp.zeros(8), "matmul", ("SAME", 2))
        y = conv.dense(
            conv.flatten(conv.to_internal(y, "matmul"), "matmul"), last.astype(y.dtype), MATRICES, impl="matmul"
        )
        return (y.astype(jnp.float32) ** 2).sum()

    forms = forms_of_products(jax.value_and_grad(network, (0, 1, 2)), first, second, last)
    # Forward, gradients of the inputs, which the first layer spares, and of the weights.
    row_major = "bf16{1,0}"
    assert sorted(forms) == [(row_major, row_major, "1", "0")] * 5 + [(row_major, row_major, "1", "1")] * 3
