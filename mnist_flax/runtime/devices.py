"""The devices that a run uses: their mesh, what lies where on it, what they compute in, where programs are kept."""

import hashlib
import math
import os
import platform
import re
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mnist_flax.runtime import settings
from mnist_flax.runtime.cli import UserError, reason

# The one rule of what lies where: batches are split over the mesh, everything else is on every device.
BATCH_AXIS = "data"
REPLICATED = P()
BATCH_SHARDED = P(None, BATCH_AXIS)  # of arrays [steps, batch, ...]


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Devices in a row, by default all; the batch is split over them. Raises what `available` does."""
    return Mesh(available() if devices is None else devices, (BATCH_AXIS,))


def available() -> list[jax.Device]:
    """All devices that JAX may use, those of a process beside each other.

    Raises:
      UserError: JAX was told to use others than there are, or to compute in another way than this project can.
    """
    settings.check()
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX knows it, and has no plugin for it
        values = jax.config.values
        told = [f"{name.upper()}={values[name]}" for name in ("jax_platforms", "jax_platform_name") if values[name]]
        said = reason(error) if isinstance(error, RuntimeError) else "its plugin or its hardware is missing"
        if told:
            raise UserError(f"{' and '.join(told)} cannot be used here ({said}): unset it") from error
        raise UserError(f"JAX cannot use this machine's devices ({said}): set JAX_PLATFORMS=cpu") from error
    return sorted(found, key=lambda device: (device.process_index, device.id))


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses a batch that does not divide among the devices.

    Raises:
      UserError: it does not, or the processes do not have as many devices each.
    """
    parts = config.optimizer.accumulate_steps
    if config.batch_size % (mesh.size * parts):
        raise UserError(
            f"config.batch_size={config.batch_size} must be a multiple of the {mesh.size} devices"
            + (f" times config.optimizer.accumulate_steps={parts}" if parts > 1 else "")
        )
    if jax.local_device_count() * jax.process_count() != jax.device_count():
        raise UserError(
            f"process {jax.process_index()} has {jax.local_device_count()} of {jax.device_count()} devices: "
            f"give each of the {jax.process_count()} processes as many"
        )


@settings.pinned()
def put(tree: Any, mesh: Mesh, spec: P = REPLICATED) -> Any:
    """Arrays that this process holds whole, like every other, on the devices as `spec` says."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree)


def describe(mesh: Mesh) -> dict:
    """What config.json and summary.json say of the devices."""
    device = mesh.devices.flat[0]
    kind = _cpu_name() if device.platform == "cpu" else device.device_kind
    return {"platform": device.platform, "kind": kind, "count": mesh.size, "processes": jax.process_count()}


def default_dtype(backend: str) -> str:
    """bfloat16 where the hardware multiplies it fast (accelerators, CPUs with AMX or AVX512-BF16), else float32."""
    multiplies = any(feature in _cpu_info() for feature in ("amx_bf16", "avx512_bf16"))
    return "bfloat16" if backend != "cpu" or multiplies else "float32"


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory unless JAX was told of another.

    One directory a kind of processor: programs are compiled for exactly the instructions it has. For commands alone:
    what it sets is the process's. Says so where the directory cannot be written; what is there is then still read.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        processor = hashlib.sha256((_cpu_name() + _cpu_field("flags")).encode()).hexdigest()[:12]
        jax.config.update("jax_compilation_cache_dir", str(cache / "mnist_flax" / processor))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start compiles twenty small ones too
    directory = jax.config.values["jax_compilation_cache_dir"]
    if "://" in directory:  # JAX's to reach
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        ways = "name another directory with XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR"
        logging.warning("compiled programs cannot be kept in %s (%s): %s", directory, error.strerror, ways)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # JAX would warn of each program
        jax.config.update("jax_enable_compilation_cache", Path(directory).is_dir())
    else:
        _mend_cache(Path(directory))


def _mend_cache(directory: Path) -> None:
    """Removes a program that cannot be read: a process died, or the disk was full, while it was written.

    JAX only warns of it, compiles anew, and does not write over it, in this run and in all later ones.
    """
    shown = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        found = re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message))
        if not found:
            return shown(message, category, filename, lineno, file, line)
        for entry in directory.glob(f"{found[1]}-*"):
            entry.unlink(missing_ok=True)
        logging.info("a compiled program in %s was damaged: it is compiled anew", directory)

    warnings.showwarning = show


@cache
def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_field(name: str) -> str:
    lines = (line.partition(":") for line in _cpu_info().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()
