"""Studies on a real PostgreSQL server, started here on a temporary directory and port."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from mnist_flax.experiments.research import directory, storage
from tests.commands import command, finish, kill_while, refusal, start
from tests.experiments.test_study import COMPLETE, FAIL, RUNNING, SEARCH, WAITING, study_file


def _binaries() -> Path:
    """Debian keeps them off the path, a version to a directory."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3].split(".")[0])
    )
    found = debian[-1] if debian else shutil.which("initdb")
    if not found:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    return Path(found).parent


def _as_other_user() -> tuple[list[str], str]:
    """How to run a program as somebody else, and who, where this is root: PostgreSQL refuses to run as root."""
    if os.geteuid():
        return [], ""
    users = {user.pw_name for user in pwd.getpwall()}
    name = "postgres" if "postgres" in users else "nobody"
    user = pwd.getpwnam(name)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"], name


@pytest.fixture(scope="module")
def server():
    """The address of a fresh database, and a function that stops its server or starts it again."""
    binaries, (prefix, user) = _binaries(), _as_other_user()
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own may be read by root alone
    if user:
        shutil.chown(directory, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off"

    def run(program: str, *arguments: object) -> None:
        line = [*prefix, str(binaries / program), *map(str, arguments)]
        subprocess.run(line, check=True, cwd=directory, stdout=subprocess.DEVNULL, timeout=60)

    def control(action: str) -> None:
        extra = ("-o", options, "-l", directory / "log") if action == "start" else ("-m", "immediate")
        run("pg_ctl", "-D", directory / "data", "-w", *extra, action)

    run("initdb", "-D", directory / "data", "-U", "researcher", "-A", "trust", "--no-sync")
    control("start")
    try:
        yield f"postgresql://researcher@127.0.0.1:{port}/postgres", control
    finally:
        if (directory / "data" / "postmaster.pid").exists():
            control("stop")
        shutil.rmtree(directory)


def test_workers_that_start_at_once_make_one_set_of_tables(server):
    url, _ = server
    engine = sqlalchemy.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text("create database crowd"))
    address = url.rpartition("/")[0] + "/crowd"
    with ThreadPoolExecutor(8) as threads:
        storages = list(threads.map(lambda _: storage.connect(address, heartbeat=60), range(8)))
    optuna.create_study(storage=storages[0], study_name="study")
    assert [s.study_name for s in storages[-1].get_all_studies()] == ["study"]
    for opened in storages:
        opened.engine.dispose()


@pytest.mark.slow
def test_workers_of_several_hosts_share_a_study_and_one_is_killed(server, digits_data_dir, tmp_path):
    url, control = server
    path = study_file(tmp_path / "search.py", SEARCH)
    told = url.replace("@", ":unsaid@")  # a password, which this server does not ask for
    arguments = (f"--config={path}", f"--config.data_dir={digits_data_dir}", f"--storage={told}", "--trials=12")
    arguments = (*arguments, "--population=2", "--heartbeat=1")
    hosts = [tmp_path / host / "study" for host in ("first", "second")]  # each has a directory of its own
    workers = [start("experiments.study", *arguments, f"--workdir={place}") for place in hosts]
    mine = f":{workers[1].pid}"
    database = storage.connect(url, heartbeat=60)

    def found(*states):
        try:
            return [
                t for t in optuna.load_study(study_name="study", storage=database).get_trials() if t.state in states
            ]
        except KeyError:
            return []

    kill_while(
        lambda: found(COMPLETE) and any(t.user_attrs.get("worker", "").endswith(mine) for t in found(RUNNING)),
        workers[1],
    )
    before = {t.number: t.value for t in found(COMPLETE)}
    finish(workers[0])
    complete = found(COMPLETE)
    assert len(complete) == 12 and not found(RUNNING, WAITING)
    assert before.items() <= {t.number: t.value for t in complete}.items()
    abandoned = [t for t in found(FAIL) if t.user_attrs.get("worker", "").endswith(mine)]
    retried = [t.system_attrs["failed_trial"] for t in complete if "failed_trial" in t.system_attrs]
    assert abandoned and {t.number for t in abandoned} <= set(retried)

    assert directory.read(hosts[0]).storage == url and "unsaid" not in (hosts[0] / "study.json").read_text()
    database.remove_session()
    control("stop")
    assert "cannot be used" in refusal("experiments.study", *arguments, f"--workdir={hosts[0]}")
    control("start")
    assert "written" in command("experiments.report", hosts[0]).stdout
