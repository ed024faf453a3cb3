import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mnist_flax.models import cnn
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.cli import UserError
from mnist_flax.training.state import hyperparameters

FIELDS = config_lib.flatten(config_lib.default_config())


def test_every_field_is_ranged_or_chosen_or_free_on_purpose():
    """A new field must say what it may be: in the tables of config.py, or here."""
    tables = (config_lib._CHOICES, config_lib._RANGES, {f"model.{key}" for key in config_lib._PER_LAYER})
    known = set().union(*tables)
    free = {"debug", "data_dir", "archive_dir", "optimizer.nesterov", "model.batch_norm", "model.logits_batch_norm"}
    assert set(FIELDS) - known == free | {"model.channels", "model.dense"}


tuples = st.tuples(st.integers(-1, 9)) | st.just(())
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tuples


@given(key=st.sampled_from(sorted(FIELDS)), value=values)
@settings(max_examples=400, deadline=None)
def test_any_value_is_accepted_or_refused_in_one_line(key, value):
    config = config_lib.default_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    try:
        config_lib.check_config(config)
    except UserError as error:
        assert "\n" not in str(error) and key.split(".")[-1].split("_")[0] in str(error)
    else:
        assert FIELDS[key] is None or isinstance(config_lib.flatten(config)[key], type(FIELDS[key]))


def test_a_whole_number_where_a_fraction_is_due_is_refused_unless_it_was_converted():
    """Only floats are hyperparameters: `state.hyperparameters` would miss it."""
    config = config_lib.default_config()
    config.augment.rotation = 10
    config_lib.check_config(config)
    assert isinstance(config.augment.rotation, float)
    config.augment = ConfigDict(config.augment.to_dict() | {"rotation": 10})
    with pytest.raises(UserError, match=r"augment\.rotation=10 must be a number with a point"):
        config_lib.check_config(config)


@given(
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dense=st.lists(st.integers(1, 90), max_size=2).map(tuple),
    kernel=st.integers(1, 7),
    pool=st.integers(1, 4),
    padding=st.sampled_from(["SAME", "VALID"]),
    head=st.sampled_from(["flatten", "average"]),
)
@settings(max_examples=30, deadline=None)
def test_the_size_of_a_network_is_known_before_it_is_made(channels, dense, kernel, pool, padding, head):
    config = config_lib.default_config()
    config.model.update({"channels": channels, "dense": dense, "padding": padding, "head": head})
    config.model.update({"kernel_sizes": (kernel,), "pool_sizes": (pool,)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_lib, "_MOST_PARAMETERS", 0)
        with pytest.raises(UserError) as caught:
            config_lib.check_config(config)
    if "shrinks the image to nothing" in str(caught.value):
        return
    network = cnn.make_model(config.model, hyperparameters(config), 10)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28), "float32"))["params"]
    kernels = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    counted = sum(leaf.size for name, leaf in kernels.items() if "kernel" in name and "logits" not in name)
    assert f"has {counted:,} parameters, more than 0" in str(caught.value)


def test_unknown_and_missing_fields_are_named():
    config = config_lib.default_config()
    with config.unlocked():
        config.optimizer.learnin_rate = 0.1
    with pytest.raises(UserError, match=r"did you mean config\.optimizer\.learning_rate"):
        config_lib.check_config(config)
    with pytest.raises(UserError, match="is missing"):
        config_lib.check_config(ConfigDict({"seed": 0}))


def test_a_norm_of_one_number_is_refused():
    config = config_lib.default_config()
    config.model.batch_norm, config.model.pool_sizes = True, (2, 2, 2, 2, 1)
    config.model.channels = (2,) * 5  # 28, 14, 7, 3, 1
    config_lib.check_config(config)
    config.batch_size = config.optimizer.accumulate_steps = 4
    with pytest.raises(UserError, match="one number at a time"):
        config_lib.check_config(config)
    config.model.channels, config.model.pool_sizes = (2,) * 4, (2,)
    config_lib.check_config(config)
    config.model.logits_batch_norm = True
    with pytest.raises(UserError, match="one number at a time"):
        config_lib.check_config(config)


def test_differences_ignore_where_data_lies_and_how_tuples_are_written():
    old, new = config_lib.default_config(), config_lib.default_config()
    new.data_dir = "/elsewhere"
    plain = old.to_dict()
    plain["model"]["channels"] = list(plain["model"]["channels"])
    assert config_lib.differences(plain, new) == []
    new.model.channels = (1, 2)
    assert config_lib.differences(plain, new) == ["model.channels: [32, 64, 64] -> [1, 2]"]
