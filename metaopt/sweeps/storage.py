"""The database of a sweep: SQLite on one machine, PostgreSQL for many."""

from __future__ import annotations

import contextlib
import fcntl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

# SQLAlchemy's errors, and Optuna's around them
ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


class StorageError(RuntimeError):
    """The database cannot be used; the message is one line."""


@dataclass(frozen=True)
class Timing:
    """How long things may take, in seconds.

    Attributes:
        heartbeat: between two signs of life of a running trial; without any for four times as long it is given up.
        stop: that a program has to write a checkpoint when it is stopped.
        patience: that a locked or unreachable database is waited for.
    """

    heartbeat: int = 30
    stop: float = 15.0
    patience: float = 60.0


class Storage(RDBStorage):
    """Optuna's, whose heartbeats survive a database that is away for a while."""

    def record_heartbeat(self, trial_id: int) -> None:
        with contextlib.suppress(*ERRORS):  # the next one may get through
            super().record_heartbeat(trial_id)


def parse(url: str) -> URL:
    """The address of a database, for a driver that is installed.

    Raises:
        StorageError: not the address of an SQLite file or of a PostgreSQL database.

    Example:
        >>> str(parse("postgresql://host/sweeps"))
        'postgresql+psycopg://host/sweeps'
    """
    try:
        parsed = make_url(url)
    except sqlalchemy.exc.ArgumentError:
        parsed = None
    kind = parsed.drivername.partition("+")[0] if parsed is not None else ""
    if parsed is None or kind not in ("sqlite", "postgresql", "postgres") or (kind == "sqlite" and not parsed.database):
        raise StorageError(
            f"storage must be sqlite:///FILE or postgresql://USER@HOST/DATABASE, got {_shown(parsed) or repr(url)}"
        )
    return parsed if kind == "sqlite" else parsed.set(drivername="postgresql+psycopg")


def open_storage(url: str, timing: Timing, *, create: bool) -> Storage:
    """Connect to a database.

    Args:
        url: SQLite's or PostgreSQL's.
        timing: how long to wait.
        create: whether the tables, and SQLite's file, are made if they are not there.

    Raises:
        StorageError: it cannot be used.
    """
    parsed = parse(url)
    wait = max(1, round(timing.patience))
    arguments: dict[str, Any] = {"connect_timeout": min(wait, 10)}
    if parsed.drivername.startswith("sqlite"):
        arguments = {"timeout": wait}
        if not create and not Path(str(parsed.database)).exists():
            raise StorageError(f"there is no database {parsed.database}")
    with one_line(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        try:
            return _connected(parsed, arguments, timing)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(1.0)  # another process makes the tables just now
            return _connected(parsed, arguments, timing)
        except ImportError:
            raise StorageError('a sweep in PostgreSQL needs psycopg: pip install "metaopt[sweeps]"') from None


def _connected(url: URL, arguments: dict[str, Any], timing: Timing) -> Storage:
    return Storage(
        url.render_as_string(hide_password=False),
        # No pool: nothing is held while a program trains, over a fork, or after the database was restarted.
        engine_kwargs={"connect_args": arguments, "poolclass": NullPool},
        heartbeat_interval=timing.heartbeat,
        grace_period=4 * timing.heartbeat,
    )


@contextmanager
def exclusive(storage: Storage, name: str) -> Iterator[None]:
    """One process at a time, of all that have this database, works on a sweep's queue.

    The lock goes with the process that holds it. In PostgreSQL it is an advisory one; beside SQLite's file it is one of
    the file system.
    """
    if storage.engine.dialect.name == "postgresql":
        with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(hashtext(:name))"), {"name": name})
            yield
            connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(hashtext(:name))"), {"name": name})
        return
    with Path(f"{storage.engine.url.database}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def one_line(url: str) -> Iterator[None]:
    """Turns errors of the database into a StorageError of one line."""
    try:
        yield
    except ERRORS as error:
        raise StorageError(f"the database {_shown(parse(url))} cannot be used: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """What the database said, in one line, without SQL."""
    while not isinstance(error, sqlalchemy.exc.DBAPIError) and error.__cause__ is not None:
        error = error.__cause__
    said = str(error.orig) if isinstance(error, sqlalchemy.exc.DBAPIError) else str(error)
    return " ".join(said.split()) or type(error).__name__


def _shown(url: URL | None) -> str:
    return "" if url is None else url.render_as_string(hide_password=True)
