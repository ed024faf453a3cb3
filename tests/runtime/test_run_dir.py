import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime import run_dir
from mnist_flax.runtime.cli import UserError


@pytest.fixture
def directory(tmp_path):
    run_dir.write_config(tmp_path, config_lib.default_config(), {"platform": "cpu", "kind": "test", "count": 1})
    return tmp_path


def test_config_comes_back_as_it_was_written(directory):
    config = config_lib.default_config()
    assert config_lib.flatten(run_dir.read_config(directory)) == config_lib.flatten(config)
    assert isinstance(run_dir.read_config(directory).model.channels, tuple)
    run_dir.check_directory(directory, config)


def test_json_may_begin_with_a_byte_order_mark(directory):
    path = directory / "config.json"
    before = run_dir.read_config(directory)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert config_lib.flatten(run_dir.read_config(directory)) == config_lib.flatten(before)
    path.write_text(path.read_text("utf-8-sig"), "utf-16")
    with pytest.raises(UserError, match="cannot be read") as caught:
        run_dir.read_config(directory)
    assert "\n" not in str(caught.value)


def test_fields_that_are_gone_are_dropped_where_they_did_nothing(directory):
    """As runs of earlier versions recorded them; those that trained with one are refused in one line."""
    path = directory / "config.json"
    recorded = run_dir.read_json(path)
    neutral = {
        "model": {"strides": [1, 1, 1], "pooling": "max", "conv_dropout_rate": 0.0},
        "optimizer": {"decay_rate": 0.9},
        "augment": {"elastic_alpha": 0.0, "elastic_sigma": 3.0, "cutout": 0.0},
    }

    def write(fields):
        config = {key: recorded["config"][key] | fields.get(key, {}) for key in neutral}
        run_dir.write_json(path, {"config": recorded["config"] | config})

    write(neutral)
    assert config_lib.flatten(run_dir.read_config(directory)) == config_lib.flatten(config_lib.default_config())
    for group, key, value in (
        ("model", "strides", [1, 2, 1]),
        ("model", "pooling", "avg"),
        ("model", "conv_dropout_rate", 0.1),
        ("augment", "elastic_alpha", 8.0),
        ("augment", "cutout", 4.0),
        ("optimizer", "schedule", "exponential"),
    ):
        write({group: {key: value}})
        with pytest.raises(UserError, match=re.escape(f"config.{group}.{key}={value!r} is ")) as caught:
            run_dir.read_config(directory)
        assert "\n" not in str(caught.value)


def test_new_directories_never_collide(tmp_path):
    made = []
    for _ in range(3):
        made.append(run_dir.new_directory("digits", tmp_path))
        time.sleep(1e-4)
    assert len(set(made)) == 3 and sorted(made) == made
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{6}Z", path.name) for path in made)


def test_a_directory_is_held_by_one_process(directory):
    with run_dir.claim(directory), pytest.raises(UserError, match="another process"), run_dir.claim(directory):
        pass
    with run_dir.claim(directory):
        pass


def test_foreign_directories_are_refused(tmp_path):
    config = config_lib.default_config()
    run_dir.check_directory(tmp_path, config)
    run_dir.check_directory(tmp_path / "new", config)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="neither empty nor a run"):
        run_dir.check_directory(tmp_path, config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(config_lib.flatten(config_lib.default_config()))), value=json_values)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_config_edited_by_hand_is_read_or_refused_in_one_line(key, value, directory):
    recorded = {"config": config_lib.default_config().to_dict()}
    *groups, name = key.split(".")
    target = recorded["config"]
    for group in groups:
        target = target[group]
    target[name] = value
    (directory / "config.json").write_text(json.dumps(recorded))
    try:
        run_dir.read_config(directory)
    except UserError as error:
        assert "\n" not in str(error)


@given(text=st.text(max_size=40) | json_values.map(json.dumps) | json_values.map(lambda v: json.dumps({"config": v})))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_file_is_read_or_refused_in_one_line(text, directory):
    (directory / "config.json").write_text(text)
    try:
        config_lib.check_config(run_dir.read_config(directory))  # a field that is not there has its default
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("field", ["path", "seed", "test_accuracy"])
def test_a_member_of_another_type_is_damage(digits_ensemble, tmp_path, field):
    recorded = run_dir.read_recorded(digits_ensemble[0])
    recorded["members"][1][field] = [recorded["members"][1][field]] if field == "path" else "0.9"
    run_dir.write_json(tmp_path / "config.json", recorded)
    with pytest.raises(UserError, match="damaged"):
        run_dir.read_members(tmp_path)
