import contextlib
import json
import re
import signal
import sqlite3

import optuna
import pytest

from mnist_flax.experiments.research import confirm, directory, storage, worker
from tests.commands import command, finish, kill_while, refusal, start, wait_for

CONFIG = """
from mnist_flax.configs import digits
from mnist_flax.experiments.research import space


def get_config():
    config = digits.get_config()
    config.num_epochs = 2
    config.model.channels, config.model.dense = (3, 4), (8,)
    config.model.compute_dtype = "float32"
    config.validation_examples = 200
    return config


{functions}
"""
SEARCH = CONFIG.format(
    functions="""
def search_space():
    return {
        "optimizer.learning_rate": space.log_uniform(1e-4, 3e-2),  # at 0.08, rounding alone decides 1 example of 16
        "model.dropout_rate": space.uniform(0.0, 0.5),
    }
"""
)


def study_file(path, text=SEARCH):
    path.write_text(text)
    return path


def open_study(place):
    record = directory.read(place)
    return directory.open_study(record, storage.connect(record.storage, heartbeat=60))


def trials(place, *states):
    return [t for t in open_study(place).get_trials() if not states or t.state in states]


COMPLETE, PRUNED, FAIL, RUNNING, WAITING = (
    getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
)


@pytest.fixture(scope="module")
def arguments(digits_data_dir, tmp_path_factory):
    """A study's command, less its directory and size."""
    path = study_file(tmp_path_factory.mktemp("configs") / "search.py")
    return (f"--config={path}", f"--config.data_dir={digits_data_dir}", "--population=3", "--heartbeat=1")


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A study of one worker: its directory and its command."""
    place = tmp_path_factory.mktemp("studies") / "finished"
    command_line = (*arguments, f"--workdir={place}", "--trials=6")
    command("experiments.study", *command_line)
    return place, command_line


@pytest.fixture(scope="module")
def shared(arguments, tmp_path_factory):
    """A study that two workers shared until one was killed: its directory, and what was complete at that moment."""
    place = tmp_path_factory.mktemp("studies") / "shared"
    command_line = (*arguments, f"--workdir={place}", "--trials=15")
    first, second = start("experiments.study", *command_line), start("experiments.study", *command_line)
    mine = f":{second.pid}"

    def busy():
        # Gives up after a second: a worker that is stopped while it writes keeps the database, and the other waits too.
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{place / 'study.db'}?mode=ro", timeout=1, uri=True)
            ) as database:
                complete = database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
                workers = database.execute(
                    "select value_json from trials join trial_user_attributes using (trial_id)"
                    " where state = 'RUNNING' and key = 'worker'"
                ).fetchall()
        except sqlite3.Error:  # that, or the study is still to be made
            return False
        return complete >= 3 and any(json.loads(name).endswith(mine) for (name,) in workers)

    kill_while(busy, second, 500)
    before = {t.number: t.value for t in trials(place, COMPLETE)}
    out = finish(first).stdout
    return place, command_line, before, mine, out


@pytest.mark.slow
def test_a_killed_worker_loses_no_finished_trial_and_its_others_are_tried_again(shared):
    place, _, before, mine, out = shared
    complete = trials(place, COMPLETE)
    assert len(complete) == 15 and not trials(place, RUNNING, WAITING)
    assert before.items() <= {t.number: t.value for t in complete}.items()
    abandoned = [t for t in trials(place, FAIL) if t.user_attrs.get("worker", "").endswith(mine)]
    assert 1 <= len(abandoned) <= 3 and "abandoned" in out
    retried = {t.system_attrs["failed_trial"]: t for t in complete if "failed_trial" in t.system_attrs}
    for trial in abandoned:
        again = retried[trial.number]
        assert not again.user_attrs["worker"].endswith(mine)
        assert trial.params.items() <= again.params.items()
    assert len({tuple(t.params.values()) for t in complete}) == 15


def test_the_same_command_does_nothing_more_and_a_larger_one_goes_on(finished):
    place, command_line = finished
    out = command("experiments.study", *command_line).stdout
    assert "trained" not in out and len(trials(place, COMPLETE)) == 6
    command("experiments.study", *command_line[:-1], "--trials=8", "--sampler=tpe")
    assert len(trials(place, COMPLETE)) == 8


def test_trials_are_what_main_would_train(finished, digits_data_dir, tmp_path):
    place, _ = finished
    best = confirm.best_trial(open_study(place))
    ended = command("mnist_flax.main", f"--config={place / 'winner.py'}", f"--config.data_dir={digits_data_dir}",
                    f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert "test_accuracy" in ended.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 1 - summary["validation_accuracy"] == pytest.approx(best.value, abs=0.0051)


def test_confirmation_pairs_fresh_seeds(finished):
    place, _ = finished
    out = command("experiments.study", "confirm", place, "--seeds=3").stdout
    found = json.loads((place / "confirmation.json").read_text())
    assert found["seeds"] == [1_000_000, 1_000_001, 1_000_002]
    scores = found["test_accuracy"]
    gaps = [a - b for a, b in zip(scores["winner"]["values"], scores["baseline"]["values"], strict=True)]
    assert scores["difference"]["values"] == pytest.approx(gaps)
    assert scores["difference"]["mean"] == pytest.approx(sum(gaps) / 3)
    assert f"{sum(gaps) / 3:.3%}" in out
    command("experiments.study", "confirm", place, "--seeds=4")  # trains the fourth seed only
    more = json.loads((place / "confirmation.json").read_text())["test_accuracy"]
    assert more["winner"]["values"][:3] == scores["winner"]["values"] and len(more["winner"]["values"]) == 4


def test_a_sweep_is_checked_before_any_work(digits_data_dir, tmp_path):
    functions = """
def derive(config):
    if config.optimizer.learning_rate == 0.02:
        raise ValueError("this one cannot be")


def sweep():
    return space.product({"optimizer.learning_rate": [0.01, 0.02]})
"""
    path, place = study_file(tmp_path / "sweep.py", CONFIG.format(functions=functions)), tmp_path / "sweep"
    arguments = (f"--config={path}", f"--config.data_dir={digits_data_dir}", f"--workdir={place}")
    assert "this one cannot be" in refusal("experiments.study", *arguments) and not place.exists()


def test_halving_divergence_and_failure(digits_data_dir, tmp_path):
    functions = """
def search_space():
    return {"optimizer.learning_rate": space.choice(1e-6, 0.01, 1e-5, 0.005, 1e38), "batch_size": space.integer(30, 32)}


def derive(config):
    if config.optimizer.learning_rate == 0.005 and config.batch_size == 31:
        raise ValueError("not this pair")


def plan():
    return space.Plan(rounds=2, objective="validation_loss")
"""
    path = study_file(tmp_path / "halving.py", CONFIG.format(functions=functions))
    place = tmp_path / "halving"
    ended = command("experiments.study", f"--config={path}", f"--config.data_dir={digits_data_dir}",
                    "--config.optimizer.warmup_epochs=0.0", f"--workdir={place}", "--trials=15")  # fmt: skip
    found = trials(place)
    assert len(found) == 15
    for trial in found:
        rate, size = trial.params["optimizer.learning_rate"], trial.params["batch_size"]
        if (rate, size) == (0.005, 31):
            assert trial.state == FAIL and "not this pair" in trial.user_attrs["error"]
        elif rate == 1e38:
            assert trial.state == PRUNED and trial.user_attrs["diverged_at_step"] < 5
        else:
            assert trial.state in (COMPLETE, PRUNED) and ("stopped_at" in trial.user_attrs) == (trial.state == PRUNED)
            assert len(trial.user_attrs["curve"]) == (2 if trial.state == COMPLETE else 1)
    ran = [t for t in found if t.state == COMPLETE or "stopped_at" in t.user_attrs]
    stopped = [t for t in ran if t.state == PRUNED]
    assert len(stopped) == len(ran) // 2
    assert min(t.user_attrs["curve"][0][3] for t in stopped) >= max(
        t.user_attrs["curve"][0][3] for t in ran if t not in stopped
    )
    best = min(t.value for t in found if t.state == COMPLETE)
    assert f"best validation_loss {best:.5g} " in ended.stdout.splitlines()[-1]
    failures = [line for line in ended.stderr.splitlines() if "failed and the study goes on" in line]
    assert len(failures) == sum(t.state == FAIL for t in found)


def test_a_study_without_any_result_says_so_and_fails(digits_data_dir, tmp_path):
    functions = """
def search_space():
    return {"train_examples": space.choice(100_000, 200_000), "optimizer.learning_rate": space.uniform(0.001, 0.01)}
"""
    path = study_file(tmp_path / "large.py", CONFIG.format(functions=functions))
    line = (f"--config={path}", f"--config.data_dir={digits_data_dir}", f"--workdir={tmp_path / 'large'}", "--trials=2")
    for failures in (2, 0):  # the second time, there is nothing more to do
        *told, last = command("experiments.study", *line, status=1).stderr.splitlines()
        assert sum("does not fit" in failure for failure in told) == failures
        assert last.startswith("error: no trial of") and "Traceback" not in last


def test_a_config_that_does_not_fit_the_data_is_refused_before_any_trial(arguments, tmp_path):
    place = tmp_path / "study"
    line = (*arguments, f"--workdir={place}", "--trials=2")
    error = refusal("experiments.study", *line, "--config.train_examples=2_000")
    assert "config.train_examples=2000 does not fit" in error
    command("experiments.study", *line)  # corrected, it starts


def test_asked_to_stop_it_queues_its_trials_and_prints_the_command(arguments, tmp_path):
    place = tmp_path / "stopped"
    command_line = (*arguments, f"--workdir={place}", "--trials=60")
    process = start("experiments.study", *command_line)
    wait_for(
        lambda: (place / "study.db").exists() and (place / "study.json").exists() and _complete(place), process, 500
    )
    process.send_signal(signal.SIGTERM)
    out = finish(process).stdout
    last = out.splitlines()[-1]
    assert last.startswith("python -m mnist_flax.experiments.study ") and str(place) in last
    found = trials(place)
    assert not [t for t in found if t.state == RUNNING]
    given_up, waiting = ([t for t in found if t.state == state] for state in (FAIL, WAITING))
    assert sorted(t.params.items() for t in given_up) == sorted(t.params.items() for t in waiting)

    confirmed = ("confirm", place, "--seeds=60", "--population=3", "--heartbeat=1")
    process = start("experiments.study", *confirmed)
    wait_for(lambda: _confirmation(place, RUNNING), process, 500)
    process.send_signal(signal.SIGTERM)
    assert f"python -m mnist_flax.experiments.study confirm {place}" in finish(process).stdout.splitlines()[-1]
    assert not _confirmation(place, RUNNING) and _confirmation(place, WAITING)
    assert len(_confirmation(place, COMPLETE, WAITING)) == 120


def _confirmation(place, *states):
    """Trials of the confirmation, as it is made and trained."""
    record = directory.read(place)
    database = storage.connect(record.storage, heartbeat=60)
    names = [study.study_name for study in database.get_all_studies() if study.study_name != record.name]
    return [t for name in names for t in optuna.load_study(study_name=name, storage=database).get_trials(states=states)]


def _complete(place):
    try:
        return bool(trials(place, COMPLETE))
    except Exception:
        return False


def test_mistakes_get_one_line_and_leave_the_study_as_it_was(finished, arguments, tmp_path):
    place, command_line = finished
    before = (place / "study.json").read_bytes(), len(trials(place))
    other = study_file(tmp_path / "other.py", SEARCH.replace("3e-2", "2e-2"))
    unnamed = study_file(tmp_path / "search.cfg")
    for wrong, hint in (
        ((f"--config={unnamed}", *command_line[1:]), "is not a Python file"),
        ((f"--config={other}", *command_line[1:]), "study of another config"),
        ((*command_line, "--config.batch_size=16"), "config.batch_size: 32 -> 16"),
        ((*command_line, "--storage=sqlite:////nowhere/study.db"), "use another directory"),
        ((*arguments, f"--workdir={tmp_path / 'new'}", "--storage=sqlite:////nowhere/at/all.db"), "cannot be used"),
        ((*arguments, f"--workdir={tmp_path / 'new'}", "--storage=postgresql://x@127.0.0.1:1/x"), "cannot be used"),
        ((*arguments, f"--workdir={tmp_path / 'new'}", "--storage=mysql://x"), "neither"),
        ((*arguments, f"--workdir={tmp_path / 'new'}", "--storage=sqlite:///"), "name a file"),
        ((*command_line, "--storage="), "names nothing"),
        ((*arguments, f"--workdir={tmp_path}"), "neither empty nor a study"),
        (("confirm", tmp_path), "no study directory"),
        (("confirm", place, "--trials=30"), "--trials is a flag of a search alone"),
        ((*command_line, "--seeds=30"), "--seeds is a flag of confirm alone"),
        (("--config=configs/default.py",), "search_space"),
        ((*arguments, "--sampler=best"), "sampler"),
        (("confirmed", "x"), "name a --config"),
    ):
        assert re.search(hint, refusal("experiments.study", *wrong))
    assert not (tmp_path / "new" / "study.json").exists()
    assert before == ((place / "study.json").read_bytes(), len(trials(place)))
    assert len(worker.live(trials(place))) >= 6
