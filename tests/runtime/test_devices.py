import subprocess
import sys

import pytest

from tests.commands import ROOT, environment

COMPILE = """
import sys
from absl import logging
from mnist_flax import devices
logging.set_verbosity(logging.INFO)
devices.keep_compiled_programs()
import jax
import jax.numpy as jnp
def program(x):
    return jnp.sin(x) @ x
print(float(jax.jit(program)(jnp.ones((8, 8))).sum()))
"""


@pytest.mark.parametrize(
    ("named", "where"),
    [
        ({"XDG_CACHE_HOME": "{}"}, "mnist_flax/*/"),  # ours keeps small programs too
        ({"JAX_COMPILATION_CACHE_DIR": "{}", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}, ""),
    ],
)
def test_a_compiled_program_that_was_cut_is_replaced(named, where, tmp_path):
    variables = environment(**{key: value.format(tmp_path) for key, value in named.items()})

    def compile_it():
        command = [sys.executable, "-c", COMPILE]
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)

    first = compile_it()
    (entry,) = tmp_path.glob(f"{where}jit_program-*-cache")
    whole = entry.stat().st_size
    entry.write_bytes(entry.read_bytes()[: whole // 2])
    again = compile_it()
    assert again.stdout == first.stdout
    assert "is compiled anew" in again.stderr and "UserWarning" not in again.stderr
    assert entry.stat().st_size > whole // 2
    assert "is compiled anew" not in compile_it().stderr
