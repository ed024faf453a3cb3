"""A run is a function of its config and seed, whatever JAX is set to."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from mnist_flax.data import datasets
from mnist_flax.experiments.research import members
from mnist_flax.inference import explain
from mnist_flax.inference.predictor import make_logits
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import devices, run_dir, settings
from mnist_flax.runtime.cli import RunError, UserError
from mnist_flax.runtime.config import default_config
from mnist_flax.training import loop
from tests.commands import finish, refusal, start

# By the name of JAX's context manager: what it is set to here. Guards would not let this test itself look at arrays.
OTHERWISE = {
    "allow_f16_reductions": False,
    "debug_infs": True,
    "debug_key_reuse": True,
    "debug_nans": True,
    "default_device": jax.devices()[0],
    "default_matmul_precision": "bfloat16",
    "disable_jit": True,
    "enable_x64": True,
    "legacy_prng_key": "error",
    "no_execution": True,
    "no_tracing": True,
    "numpy_dtype_promotion": "strict",
    "numpy_rank_promotion": "raise",
    "softmax_custom_jvp": True,
    "threefry_partitionable": False,
    "transfer_guard_device_to_device": "disallow",
    "transfer_guard_device_to_host": "disallow",
    "transfer_guard_host_to_device": "disallow",
}
# Settings that are the user's: they change no result here, or belong to what this project does not use.
FREE = """
    check_vma jax2tf_associative_scan_reductions jax2tf_default_native_serialization
    jax_array_garbage_collection_guard jax_auto_pcast jax_backend_target jax_bcoo_cusparse_lowering
    jax_captured_constants_report_frames jax_captured_constants_warn_bytes jax_check_proxy_envs
    jax_check_static_indices jax_check_tracer_leaks jax_compilation_cache_check_contents jax_compilation_cache_dir
    jax_compilation_cache_expect_pgle jax_compilation_cache_include_metadata_in_key jax_compilation_cache_max_size
    jax_compiler_detailed_logging_min_ops jax_cpu_collectives_implementation jax_cpu_enable_async_dispatch
    jax_cpu_get_global_topology_timeout_minutes jax_cpu_get_local_topology_timeout_minutes
    jax_cross_host_transfer_socket_address jax_cross_host_transfer_timeout_seconds
    jax_cross_host_transfer_transfer_size jax_cross_host_transport_addresses jax_cuda_visible_devices
    jax_debug_leaked_clients_on_clear_backends jax_debug_log_modules jax_default_prng_impl jax_disable_bwd_checks
    jax_disable_vmap_shmap_error jax_disallow_mesh_context_manager jax_distributed_debug
    jax_distributed_verify_secure_credentials jax_dump_ir_modes jax_dump_ir_to jax_embedded_constants_max_bytes
    jax_enable_checks jax_enable_compilation_cache jax_enable_custom_prng jax_enable_preemption_service
    jax_enable_recoverability jax_experimental_unsafe_xla_runtime_errors jax_explain_cache_misses
    jax_explicit_x64_dtypes jax_export_calling_convention_version jax_export_deserialize_expired_versions
    jax_export_ignore_forward_compatibility jax_force_dcn_cross_host_transfers jax_high_dynamic_range_gumbel
    jax_hlo_source_file_canonicalization_regex jax_include_debug_info_in_dumps
    jax_include_full_tracebacks_in_locations jax_log_checkpoint_residuals jax_log_compiles jax_logging_level
    jax_mock_gpu_topology jax_mosaic_allow_hlo jax_mosaic_unzip_debug_locations jax_mtls_ca_file jax_mtls_cert_file
    jax_mtls_key_file jax_mtls_peer_uri_prefix jax_mutable_array_checks jax_num_cpu_devices
    jax_oneapi_visible_devices jax_pallas_auto_assign_collective_ids jax_pallas_auto_assign_collective_ids_limit
    jax_pallas_enable_debug_checks jax_pallas_poison_buffers jax_pallas_use_mosaic_gpu jax_pallas_verbose_errors
    jax_persistent_cache_enable_xla_caches jax_persistent_cache_min_compile_time_secs
    jax_persistent_cache_min_entry_size_bytes jax_pgle_aggregation_percentile jax_pgle_profiling_runs
    jax_pjrt_client_create_options jax_platform_name jax_platforms jax_pprint_use_color
    jax_ragged_dot_use_gpu_pallas_triton_lowering jax_ragged_dot_use_ragged_dot_instruction
    jax_raise_on_ppermute_sort_diff jax_raise_persistent_cache_errors jax_refs_to_pins
    jax_remat_barrier_no_cotangents jax_remove_custom_partitioning_ptr_from_cache_key
    jax_remove_size_one_mesh_axis_from_type jax_rocm_visible_devices jax_send_traceback_to_runtime
    jax_serialization_version jax_share_binary_between_hosts jax_share_binary_between_hosts_timeout_ms
    jax_sort_devices_by_process_index jax_source_url_schema jax_thread_guard jax_threefry_gpu_kernel_lowering
    jax_traceback_filtering jax_traceback_in_locations_limit jax_tracer_error_num_traceback_frames
    jax_transfer_guard jax_use_cpp_shard_args jax_use_emit_pipeline_primitive jax_use_magma
    jax_use_simplified_jaxpr_constants jax_xla_backend jax_xla_profile_version mock_num_gpu_processes
"""


@contextlib.contextmanager
def changed(values):
    """Settings of the whole process, set back afterwards."""
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """A program that is the same in all respects is compiled once."""
    place = str(tmp_path_factory.mktemp("compiled"))
    with changed({"jax_compilation_cache_dir": place, "jax_persistent_cache_min_compile_time_secs": 0.0}):
        yield


@pytest.fixture
def otherwise():
    """All settings that are held, and the default implementation of keys, set to something else."""
    values = {f"jax_{name}": value for name, value in OTHERWISE.items()}
    with changed(values | {"jax_default_prng_impl": "rbg"}):
        yield


@pytest.fixture(scope="module")
def config(digits_data_dir):
    config = default_config()
    config.dataset, config.data_dir = "digits", str(digits_data_dir)
    config.train_examples, config.batch_size, config.num_epochs = 320, 64, 2
    config.model.channels, config.model.pool_sizes, config.model.dense = (4,), (2,), (8,)
    config.model.batch_norm, config.model.dropout_rate, config.model.compute_dtype = True, 0.1, "float32"
    config.optimizer.clip_norm, config.optimizer.label_smoothing, config.optimizer.ema_decay = 1.0, 0.1, 0.9
    return config


@pytest.fixture(scope="module")
def splits(config):
    return datasets.load(config)


def fit(config, splits, directory, stop=lambda: False):
    mesh = devices.make_mesh()
    run_dir.write_config(directory, config, devices.describe(mesh))
    return loop.fit(config, splits, 10, directory, mesh, stop).state


@pytest.fixture(scope="module")
def undisturbed(config, splits, tmp_path_factory):
    """A run with JAX's defaults, and its state."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, jax.device_get(fit(config, splits, directory))


@pytest.fixture
def same(undisturbed):
    """Asserts that a state is that of the undisturbed run, in every bit and type."""

    def check(state):
        with settings.pinned():
            state = jax.device_get(state)
        for (path, ours), theirs in zip(
            jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(undisturbed[1]), strict=True
        ):
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes()), path

    return check


def test_every_setting_of_jax_is_held_refused_or_free():
    held = {f"jax_{name}" for name in settings.PINNED}
    assert sorted(jax.config.values.keys() - held - settings.REFUSED.keys() - set(FREE.split())) == []
    assert OTHERWISE.keys() == settings.PINNED.keys()


def test_what_is_held_is_at_its_default_within_a_call_alone(otherwise):
    def now():
        return {name: getattr(jax.config, f"jax_{name}") for name in settings.PINNED}

    before = now()
    with settings.pinned():
        assert now() == settings.PINNED
    assert now() == before == OTHERWISE


def test_training_ends_bit_for_bit_the_same_under_other_settings(config, splits, otherwise, same, tmp_path):
    same(fit(config, splits, tmp_path))


def test_a_run_is_resumed_under_other_settings_bit_for_bit(config, splits, otherwise, same, tmp_path):
    with settings.pinned():  # as the run was begun
        assert int(fit(config, splits, tmp_path, lambda: True).step) == 5
    same(fit(config, splits, tmp_path))


def test_a_finished_run_gives_the_same_answers_under_other_settings(undisturbed, splits, otherwise):
    def answers():
        trained, image = load_run(undisturbed[0]), splits.test.images[0]
        return make_logits(trained)(splits.test.images), *explain.make_explain(trained, 1.0)(image, 3)[1:]

    found = answers()
    with settings.pinned():
        expected = answers()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_a_population_is_the_same_under_other_settings(config, splits, otherwise):
    def losses():
        programs = members.Programs(splits, 10, members.make_mesh(), "map", config.eval_batch_size)
        population = members.Population([config], programs)
        population.advance(1.0, np.ones(1, bool))
        return [record.loss for record in population.records[0]], population.test()

    found = losses()
    with settings.pinned():
        assert losses() == found


@pytest.mark.parametrize("name", sorted(settings.REFUSED.keys() & jax.config.values.keys()))
def test_what_cannot_be_held_is_refused_where_devices_are_asked_for(name):
    default = settings.REFUSED[name]
    other = {"UNKNOWN": "O1", "O2": "O1", "ignore": "raise", None: True}.get(default, not default)
    value = type(default)(other) if isinstance(default, int | float) else other
    refused = pytest.raises(UserError, match=rf"{name.upper()}=.* changes what is computed: unset it")
    with changed({name: value}), refused:
        devices.make_mesh()


def test_a_guard_that_no_thread_gets_past_is_refused_by_the_name_that_was_used():
    guards = [f"jax_{name}" for name in settings.PINNED if name.startswith("transfer_guard")]
    refused = pytest.raises(UserError, match="JAX_TRANSFER_GUARD=disallow_explicit")
    with changed(dict.fromkeys(["jax_transfer_guard", *guards], "disallow_explicit")), refused:
        devices.make_mesh()


VARIABLES = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_DISABLE_JIT": "1",
}


def test_a_command_under_such_variables_scores_a_finished_run_as_it_was(digits_run, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(digits_run, place)
    recorded = json.loads((place / "evaluation_test.json").read_text())
    (place / "evaluation_test.json").unlink()
    finish(start("mnist_flax.evaluate", place, **VARIABLES))
    assert json.loads((place / "evaluation_test.json").read_text()) == recorded


@pytest.mark.parametrize(
    ("module", "variable"),
    [
        ("mnist_flax.main", "JAX_PLATFORMS=cuda"),
        ("mnist_flax.main", "JAX_PLATFORMS=nonsense"),
        ("mnist_flax.main", "JAX_RANDOM_SEED_OFFSET=1"),
        ("mnist_flax.main", "JAX_ENABLE_X64=perhaps"),
        ("experiments.population", "JAX_PLATFORMS=gpu"),
        ("experiments.augmentations", "JAX_PLATFORMS=tpu"),
    ],
)
def test_a_backend_that_is_not_there_or_a_setting_that_cannot_be_is_refused_before_anything(module, variable, tmp_path):
    name, value = variable.split("=")
    fields = ("--config=configs/digits.py", f"--config.data_dir={tmp_path / 'data'}")
    error = refusal(module, *fields, **{name: value})
    assert name in error and not any(tmp_path.iterdir())


def test_a_finished_run_is_refused_without_the_backend_too(digits_run):
    assert "JAX_PLATFORM_NAME=cuda" in refusal("mnist_flax.predict", digits_run, "x.png", JAX_PLATFORM_NAME="cuda")


def test_checkpoints_of_other_types_are_not_called_damaged(config, splits, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    config = config.copy_and_resolve_references()
    config.model.dense = (9,)
    run_dir.write_json(tmp_path / "run" / "config.json", {"config": config.to_dict()})
    for reads in (lambda: fit(config, splits, tmp_path / "run"), lambda: load_run(tmp_path / "run")):
        with pytest.raises(RunError, match=r"dense0/.* is float32\[.*8\] in it and float32\[.*9\]") as caught:
            reads()
        assert "damaged" not in str(caught.value) and "remove" not in str(caught.value)
