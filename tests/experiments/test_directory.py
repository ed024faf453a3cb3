import json
import shutil
from dataclasses import replace

import optuna
import pytest

from mnist_flax.experiments.research import directory, space, storage, worker
from mnist_flax.runtime.config import default_config
from tests.experiments.test_study import open_study

DEFINITION = space.Definition(default_config(), {"seed": space.integer(0, 9)}, [], space.Plan())


def new_study(place):
    """A study directory, its study without trials."""
    record = directory.prepare(place, DEFINITION, None)
    worker.join(record.name, DEFINITION, storage.connect(record.storage, heartbeat=60), place)
    return place


@pytest.fixture
def place(tmp_path):
    return new_study(tmp_path / "which? {100%41} #1" / "study")


def test_a_study_that_is_copied_or_moved_takes_its_trials_along(place):
    assert (place / "study.db").exists()
    trial = optuna.create_trial(value=0.5)
    open_study(place).add_trial(trial)
    copied = shutil.copytree(place, place.with_name("copied"))
    for _ in range(2):
        open_study(copied).add_trial(trial)
    moved = place.rename(place.with_name("moved"))
    assert len(open_study(moved).trials) == 1 and len(open_study(copied).trials) == 3
    assert directory.prepare(moved, DEFINITION, None) == directory.read(moved)


@pytest.mark.parametrize("url", ["sqlite:///{}/other.db", "sqlite:///{}/study.db"])
def test_a_storage_that_was_named_is_where_it_was(tmp_path, url):
    url, place = url.format(tmp_path), tmp_path / "study"
    assert directory.prepare(place, DEFINITION, url).storage == url
    moved = place.rename(tmp_path / "moved")
    assert directory.read(moved).storage == url


def test_a_storage_in_a_file_is_found_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(directory.UserError, match="name a file"):
            directory.prepare(tmp_path / "study", DEFINITION, url)
    assert not (tmp_path / "study").exists()
    for _ in range(2):  # the second time, it goes on
        record = directory.prepare(tmp_path / "study", DEFINITION, "sqlite:///other.db")
        assert record.storage == directory.read(tmp_path / "study").storage == f"sqlite:///{tmp_path / 'other.db'}"


def test_what_a_killed_write_left_is_no_trouble(place):
    for name in ("winner.py", "study.json", "report.html", "confirmation.json"):
        (place / f"{name}.tmp").write_text("{")
    assert directory.prepare(place, DEFINITION, None).name == "study"

    new = place.with_name("new")
    new.mkdir()
    (new / "study.json.tmp").write_text("{")
    assert directory.prepare(new, DEFINITION, None).name == "new"


@pytest.mark.parametrize("name", ["notes.tmp", "notes.txt", ".tmp"])
def test_what_is_not_of_a_study_is_not_written_beside(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(directory.UserError, match="neither empty nor a study"):
        directory.prepare(tmp_path, DEFINITION, None)


@pytest.mark.parametrize(
    "change", [{"space": {}}, {"plan": space.Plan(rounds="3")}, {"plan": space.Plan(question={0})}]
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, change):
    with pytest.raises(directory.UserError, match="cannot be written down"):
        directory.prepare(tmp_path / "study", replace(DEFINITION, **change), None)
    assert directory.prepare(tmp_path / "study", DEFINITION, None).name == "study"


@pytest.mark.parametrize("url", [0, [], {}, False])
def test_a_storage_that_is_no_address_is_refused(place, url):
    details = json.loads((place / "study.json").read_text())
    (place / "study.json").write_text(json.dumps(details | {"storage": url}))
    with pytest.raises(directory.UserError, match="was damaged"):
        directory.read(place)
