"""Where a study is kept: an Optuna database that any number of workers share, and what makes sharing safe.

A worker takes trials under a lock, so a study never has more of them than were asked for. While it trains it records
a heartbeat for each; where one stops, the trial is taken for abandoned and queued again with the same parameters.
"""

import contextlib
import fcntl
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from mnist_flax.runtime.cli import UserError, reason

GRACE = 6  # heartbeats that may be missed: a worker may be busy compiling
FAILURES = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)  # Optuna wraps most of the former
_LOCK_KEY = 0x6D6E697374  # of PostgreSQL's advisory lock
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", "Heartbeat of storage")  # ours is recorded by `heartbeats`


def default_url(directory: Path) -> str:
    return sqlalchemy.URL.create("sqlite", database=str(directory.resolve() / "study.db")).render_as_string()


def absolute(url: str) -> str:
    """The address with the path of an SQLite file made absolute, since a study is opened from other directories, too.

    Raises:
      UserError: it names no file, so that all would be lost at the end.
    """
    if not url.startswith("sqlite:///"):
        return url
    address = sqlalchemy.make_url(url)
    if address.database in (None, "", ":memory:"):
        raise UserError(f"{url} is a database in memory, lost at the end: name a file, sqlite:///PATH")
    return address.set(database=str(Path(address.database).absolute())).render_as_string()


def connect(url: str, heartbeat: int) -> RDBStorage:
    """Opens the database, and makes its tables where there are none.

    Args:
      url: `sqlite:///PATH` or `postgresql://USER@HOST/DATABASE` (the password best in PGPASSWORD or ~/.pgpass).
      heartbeat: seconds between the signs of life of a running trial.

    Raises:
      UserError: it cannot be reached or used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not url.startswith(("sqlite:///", "postgresql://")):
        raise UserError(f"{public(url)} is neither sqlite:///PATH nor postgresql://USER@HOST/DATABASE")
    options = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10}
    try:
        address = url.replace("postgresql://", "postgresql+psycopg://")
        engine = sqlalchemy.create_engine(address, connect_args=options)
        with _advisory_lock(engine):  # two that make the tables at once would fail
            return RDBStorage(
                address,
                engine_kwargs={"connect_args": options, "pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=GRACE * heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
    except ImportError as error:
        raise UserError("PostgreSQL needs psycopg: pip install 'mnist_flax[research]'") from error
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ValueError) as error:
        said = reason(getattr(error, "orig", None) or error)
        raise UserError(f"{public(url)} cannot be used: {said}") from error


def public(url: str) -> str:
    """The address without its password, as it may be shown, written down and connected to again."""
    try:
        address = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        return url
    return address._replace(password=None).difference_update_query(["password"]).render_as_string()


@contextlib.contextmanager
def exclusive(storage: RDBStorage) -> Iterator[None]:
    """Keeps every other worker out of this block; let go of when the process ends, however it does."""
    if storage.engine.dialect.name == "sqlite":
        with open(f"{storage.engine.url.database}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    else:
        with _advisory_lock(storage.engine):
            yield


@contextlib.contextmanager
def _advisory_lock(engine: sqlalchemy.Engine) -> Iterator[None]:
    """PostgreSQL's; of other databases nothing is locked."""
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"select pg_advisory_lock({_LOCK_KEY})"))
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text(f"select pg_advisory_unlock({_LOCK_KEY})"))


def retry_abandoned(study: optuna.Study, storage: RDBStorage) -> int:
    """Queues the trials of workers that are gone again; gives their number. Within `exclusive`."""
    before = len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
    optuna.storages.fail_stale_trials(study)
    # Optuna passes over trials without a heartbeat. Taking one ends with its first, within `exclusive`, so whoever
    # took these was killed at it.
    with storage.engine.connect() as connection:
        beating = set(connection.execute(sqlalchemy.text("select trial_id from trial_heartbeats")).scalars())
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial._trial_id not in beating:
            requeue(study, trial)
    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,))) - before


def requeue(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Gives a running trial up and queues it with the same parameters."""
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    RetryHeartbeatStaleTrialCallback()(study, trial)


@contextlib.contextmanager
def heartbeats(storage: RDBStorage, trial_ids: list[int]) -> Iterator[None]:
    """Records that these trials are being worked on, at once and until the block ends."""
    ended = threading.Event()
    interval = storage.heartbeat_interval
    assert interval

    def beat() -> None:
        for trial_id in trial_ids:
            storage.record_heartbeat(trial_id)

    def keep_beating() -> None:
        while not ended.wait(interval):
            with contextlib.suppress(*FAILURES):  # tried again; trials may have gone elsewhere
                beat()

    beat()
    thread = threading.Thread(target=keep_beating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
