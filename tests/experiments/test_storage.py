import time

import optuna
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from mnist_flax.experiments.research import storage
from tests.experiments.test_study import FAIL, RUNNING, WAITING


def test_trials_of_a_worker_that_was_killed_while_taking_them_are_tried_again(tmp_path):
    database = storage.connect(storage.default_url(tmp_path), heartbeat=60)
    study = optuna.create_study(storage=database)
    _, named, alive = (study.ask() for _ in range(3))
    for trial in (named, alive):
        trial.set_user_attr("worker", "host:1")
    database.record_heartbeat(alive._trial_id)
    with storage.exclusive(database):
        assert storage.retry_abandoned(study, database) == 2
    assert [t.state for t in study.get_trials()] == [FAIL, FAIL, RUNNING, WAITING, WAITING]
    again = study.ask()
    assert again.number in (3, 4)
    with storage.exclusive(database):
        assert storage.retry_abandoned(study, database) == 1
    assert [t.state for t in study.get_trials()].count(WAITING) == 2


def test_heartbeats_outlive_a_failure_of_the_database(tmp_path):
    database = storage.connect(storage.default_url(tmp_path), heartbeat=1)
    study = optuna.create_study(storage=database)
    trial = study.ask()

    def sql(text):
        with database.engine.begin() as connection:
            return connection.execute(sqlalchemy.text(text))

    with storage.heartbeats(database, [trial._trial_id]):
        sql("alter table trial_heartbeats rename to elsewhere")
        time.sleep(2.5)  # in which two fail
        sql("alter table elsewhere rename to trial_heartbeats")
        sql("update trial_heartbeats set heartbeat = '2000-01-01 00:00:00'")
        deadline = time.monotonic() + 20
        while "2000" in sql("select heartbeat from trial_heartbeats").scalar():
            assert time.monotonic() < deadline, "no heartbeat came"
            time.sleep(0.02)


@given(st.text(min_size=1), st.sampled_from(["user", "query"]))
def test_what_is_written_down_is_the_address_without_its_password(password, part):
    address = sqlalchemy.URL.create("postgresql", "me", host="host", port=5432, database="db", query={"sslmode": "on"})
    told = address.set(password=password) if part == "user" else address.update_query_dict({"password": password})
    written = storage.public(told.render_as_string(hide_password=False))
    assert sqlalchemy.make_url(written) == address
