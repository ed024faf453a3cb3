"""16-bit numbers as integers, against NumPy's view of the same bytes, and arrays that are materialized."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.ops.xla_cpu import as_bits, as_numbers, materialize, widened

NUMBERS = np.float32([0.0, -0.0, 1.0, -1.5, 3e38, 1e-40, np.inf, -np.inf, np.nan])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bits_are_those_in_memory_and_come_back(dtype):
    with np.errstate(over="ignore"):
        numbers = NUMBERS.astype(dtype)
    bits = as_bits(jnp.asarray(numbers))
    np.testing.assert_array_equal(bits, numbers.view(np.uint16), strict=True)
    back = np.asarray(as_numbers(bits, dtype))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back.view(np.uint16), numbers.view(np.uint16))


def test_widened_bits_are_the_same_numbers():
    numbers = NUMBERS.astype(jnp.bfloat16)
    wide = np.asarray(widened(as_bits(jnp.asarray(numbers))))
    np.testing.assert_array_equal(wide.view(np.uint32), numbers.astype(np.float32).view(np.uint32), strict=True)


def test_wider_numbers_stay_as_they_are():
    x = jnp.asarray(NUMBERS)
    assert as_bits(x) is x and as_numbers(x, x.dtype) is x and widened(x) is x


def test_bits_are_not_differentiated_in_silence():
    with pytest.raises(TypeError, match=r"set config.model.conv=lax"):
        jax.grad(lambda x: as_numbers(as_bits(x), x.dtype).astype(jnp.float32))(jnp.bfloat16(1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint16, jnp.int32])
@pytest.mark.parametrize("first", [0, -1, "least"])
def test_materialized_values_do_not_depend_on_the_first_number(dtype, first):
    """Whose sign and bits the branch looks at."""
    integer = np.dtype(f"i{dtype.dtype.itemsize}")
    bits = np.arange(12, dtype=integer)
    bits[0] = np.iinfo(integer).min if first == "least" else first
    x = bits.view(dtype).reshape(3, 4)
    found = jax.jit(lambda x: materialize(lambda x: x.T[::-1], x))(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found).view(integer), x.T[::-1].view(integer))


def test_what_is_materialized_is_not_folded_into_its_use():
    def square(x):
        return materialize(lambda x: x.T, x) @ x

    compiled = jax.jit(square).lower(jnp.ones((3, 4))).compile()
    assert re.search(r"= \S+ conditional\(", compiled.as_text())
    np.testing.assert_allclose(compiled(jnp.ones((3, 4))), np.full((4, 4), 3))
