import subprocess
import sys

import pytest

from tests.commands import ROOT, environment

COMPILE = """
import sys
from absl import logging
from mnist_flax.runtime import devices
logging.set_verbosity(logging.INFO)
devices.keep_compiled_programs()
import jax
import jax.numpy as jnp
hits = set()
jax.monitoring.register_event_listener(lambda event, **_: "cache_hit" in event and hits.add("hit"))
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


def test_a_cache_that_cannot_be_written_is_told_once_as_what_it_is():
    variables = environment(XDG_CACHE_HOME="/dev/null")
    ran = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=variables, capture_output=True, text=True)
    (line,) = ran.stderr.splitlines()
    assert ran.stdout and "cannot be kept in /dev/null/" in line and "JAX_COMPILATION_CACHE_DIR" in line


def test_a_cache_that_may_only_be_read_is_read(tmp_path):
    def compile_it():
        variables = environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        command = [sys.executable, "-c", f"{COMPILE}print(hits)"]
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)

    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        assert "hit" not in compile_it().stdout
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        again = compile_it()
        assert "hit" in again.stdout and again.stderr.count("\n") == 1 and "Read-only file system" in again.stderr
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
