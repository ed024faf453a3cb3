"""JAX's settings while this project computes: a run is a function of its config and seed, whatever they are.

They come from `JAX_...` variables and from `jax.config`. Those that change results, types or what is allowed hold
JAX's defaults for the length of a call (`pinned`), in the calling thread alone; the few that JAX cannot set so are
refused (`check`). All others are the user's: where programs are kept, what is logged, which devices are used.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from mnist_flax.runtime.cli import UserError

# By the name of JAX's context manager. The implementation of keys is named where keys are made: `random.make_key`.
PINNED: dict[str, Any] = {
    "allow_f16_reductions": True,
    "debug_infs": False,
    "debug_key_reuse": False,
    "debug_nans": False,
    "default_device": None,
    "default_matmul_precision": None,
    "disable_jit": False,
    "enable_x64": False,
    "legacy_prng_key": "allow",
    "no_execution": False,
    "no_tracing": False,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "softmax_custom_jvp": False,
    "threefry_partitionable": True,
    "transfer_guard_device_to_device": "allow",
    "transfer_guard_device_to_host": "allow",
    "transfer_guard_host_to_device": "allow",
}
REFUSED: dict[str, Any] = {
    "eager_constant_folding": False,
    "jax_accurate_erf_inv": False,
    "jax_compiler_enable_remat_pass": True,
    "jax_custom_jvp3": False,
    "jax_custom_vjp3": False,
    "jax_disable_most_optimizations": False,
    "jax_enable_pgle": False,
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_optimization_level": "UNKNOWN",
    "jax_random_seed_offset": 0,
    "jax_remat3": False,
    "jax_scan3": False,
    "jax_use_direct_linearize": True,
    "jax_use_hlo_logistic_lowering": None,
    "jax_use_rgv3": True,
    "jax_use_shardy_partitioner": True,
}


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Holds the settings that change results at JAX's defaults; as a decorator, for the length of each call."""
    import jax  # commands refuse what they can before it is imported

    with contextlib.ExitStack() as stack:
        for name, value in PINNED.items():
            if getattr(jax.config, f"jax_{name}") not in (value, None):  # None is JAX's default
                stack.enter_context(getattr(jax, name)(value))
        yield


def check() -> None:
    """Raises UserError for a setting that changes results and that no call can hold at its default."""
    import jax

    values = jax.config.values
    for name, default in REFUSED.items():  # a version of JAX may not have all of them
        if (value := values.get(name, default)) != default:
            raise UserError(f"{name.upper()}={value} changes what is computed: unset it ({default} is JAX's default)")
    for name in reversed(values):  # last comes the guard that sets the others
        if values[name] == "disallow_explicit":  # also in Orbax's threads
            raise UserError(f"{name.upper()}=disallow_explicit keeps checkpoints from being read: unset it")
