"""Where a study is kept: a journal file, or any database of Optuna's, which may be slow, locked or restarted."""

import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.event import listens_for
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from emorl.config import UserError
from emorl.config.secrets import masked

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 120.0
_TABLES_SECONDS = 10.0


def open_storage(storage: str | Path) -> BaseStorage:
    """A journal file, or a database by its URL (`sqlite:///…`, `postgresql+psycopg://…`).

    Raises:
        UserError: a damaged journal, a URL that cannot be opened or holds a password.
    """
    if isinstance(storage, Path):
        return _journal(storage)
    check_storage(storage)
    try:
        return optuna.storages.get_storage(_opened(storage, make_url(storage).get_backend_name()))
    except (ArgumentError, SQLAlchemyError, StorageInternalError, ImportError) as error:
        raise UserError(f"search.storage {storage}: {str(error).splitlines()[0]:.200}") from None


def check_storage(storage: str) -> None:
    """Refuses a URL that is none, and one with a password, before anything is written: UserError."""
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise UserError(f"search.storage {masked(storage)}: {error}; expected such as sqlite:///studies.db") from None
    if url.password is not None:
        raise UserError(
            f"search.storage {masked(storage)}: a password in a URL would be written into the run; leave it out and give it by "
            "the environment (PGPASSWORD, or a ~/.pgpass file)"
        )


def _opened(storage: str, backend: str) -> RDBStorage:
    """The database with Optuna's tables; of several workers that make these at once, all but one try again."""
    waits = {"connect_args": {"timeout": _PATIENCE_SECONDS}} if backend == "sqlite" else {"pool_pre_ping": True}
    end = time.monotonic() + _TABLES_SECONDS
    while True:
        try:
            opened = _PatientStorage(storage, engine_kwargs=waits)
            if backend == "sqlite":
                _lock_at_begin(opened.engine)
            return opened
        except (DBAPIError, StorageInternalError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _lock_at_begin(engine: Engine) -> None:
    """SQLite locks no rows: whoever begins has the whole database, so that no two workers claim one trial."""
    engine.dispose()

    @listens_for(engine, "connect")
    def by_hand(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @listens_for(engine, "begin")
    def immediately(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, tried again for a while where the database is locked or away."""

    @functools.wraps(method)
    def tried(*arguments: Any, **options: Any) -> Any:
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return method(*arguments, **options)
            except (DBAPIError, StorageInternalError) as error:
                cause = error if isinstance(error, DBAPIError) else error.__cause__
                if isinstance(cause, IntegrityError) or time.monotonic() > end:
                    raise
                time.sleep(0.5)

    return tried


class _PatientStorage(RDBStorage):
    """Optuna's, whose every operation outlives a restart of the database."""


_CALLED_BY_ITS_CACHE = ("_get_trials", "_create_new_trial", "_set_trial_param")
for _name in (*BaseStorage.__abstractmethods__, *_CALLED_BY_ITS_CACHE):
    setattr(_PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def _journal(path: Path) -> BaseStorage:
    """Optuna's journal storage on `path`; a line cut short by a kill is moved aside, any other damage is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: Any = _KernelLock(path.with_name(f"{path.name}.lock"))
    if path.exists():
        lock.acquire()  # nobody is in the middle of writing a line
        _set_torn_line_aside(path)
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged and cannot be read as an Optuna journal ({type(error).__name__}: {error}); restore it from "
            "a copy, or move it away to start the search again"
        ) from None


class _KernelLock:
    """Optuna's journal lock as one that the kernel releases when its holder is killed; Optuna's own then waits 30 s."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()


def _set_torn_line_aside(path: Path) -> None:
    content = path.read_bytes()
    whole, newline, torn = content.rpartition(b"\n")
    if not torn:
        return
    aside = path.with_name(f"{path.name}.torn")
    aside.write_bytes(torn)
    os.truncate(path, len(whole) + len(newline))
    logger.warning("%s ended in the middle of a line; its %d bytes are in %s", path, len(torn), aside)
