"""Where the owner's state lies: a SQLite file, or a PostgreSQL database that several owners share."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitfl.errors import DataError, ResourceError, UsageError

try:
    from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
    from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
except ImportError as error:
    raise ResourceError("An owner's state (--state) needs SQLAlchemy.", hint="pip install 'splitfl[owner]'") from error

from model_owner.state.schema import SCHEMA, migrate, version_of

_BUSY_S = 10.0
_CLAIM_S = 2.0
_MIGRATION_LOCK = 0x53464C53  # "SFLS"


class Database:
    """A state, open. Use `close`, or a `with` block.

    Args:
        place: path of a SQLite file, or a URL such as ``postgresql+psycopg://user@host/name``. Passwords do not belong
            into a URL, which stands in process lists and records: PostgreSQL's own ways are used (``PGPASSWORD``,
            ``~/.pgpass``).
        write: make the tables, or bring them to the present version. Without it the place must have them.
        server: name of this owner; with it, no other owner of that name may use the state at the same time.

    Raises:
        UsageError: a URL that cannot be used.
        ResourceError: it is in use, cannot be made, read or reached, or a driver is missing.
        DataError: it is something else, or written by a newer splitfl.
    """

    def __init__(self, place: str | Path, *, write: bool = True, server: str | None = None) -> None:
        self.url = url_of(place)
        self.place = self.url.database or "" if self.is_sqlite else self.url.render_as_string(hide_password=True)
        self._held = contextlib.ExitStack()
        with self.explained():
            self.engine = self._make_engine(write)
        self._held.callback(self.engine.dispose)
        try:
            with self.explained():
                if server is not None:
                    self._claim(server)
                with self.engine.begin() as db:
                    if write:
                        self._migrate(db)
                    else:
                        self._check(db)
        except BaseException:
            self.close()
            raise

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.url.get_backend_name() == "sqlite"

    def close(self) -> None:
        """Close; later use is an error."""
        self._held.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What the database says, in our errors. No statement and no value goes into them."""
        try:
            yield
        except DBAPIError as error:
            raise self._explain(error) from error
        except NoSuchModuleError as error:
            raise UsageError(f"--state names a database of an unknown kind: {self.url.drivername}.",
                             expected="a path, or postgresql+psycopg://USER@HOST/NAME") from error  # fmt: skip
        except ModuleNotFoundError as error:
            raise ResourceError(
                f"The driver for {self.url.drivername} is not installed.", hint="pip install 'splitfl[postgres]'"
            ) from error
        except SQLAlchemyError as error:
            raise ResourceError(f"{self.place} cannot be used: {type(error).__name__}.") from error

    def _explain(self, error: DBAPIError) -> Exception:
        said = str(error.orig).splitlines()[0] if str(error.orig) else type(error.orig).__name__
        if isinstance(error.orig, sqlite3.DatabaseError) and not isinstance(error.orig, sqlite3.OperationalError):
            return DataError(f"{self.place} is damaged, or no database: {said}.")
        return ResourceError(
            f"{self.place} cannot be read or written: {said}.",
            hint="look at the disk and the file's mode" if self.is_sqlite else "look at the server, user and password",
        )

    def _make_engine(self, write: bool) -> Engine:
        if not self.is_sqlite:
            patience = {} if "connect_timeout" in self.url.query else {"connect_timeout": round(_BUSY_S)}
            engine = create_engine(
                self.url, hide_parameters=True, pool_pre_ping=True, pool_size=2, max_overflow=1, connect_args=patience
            )
            event.listen(engine, "connect", _keep_alive)
            return engine
        path = Path(self.place)
        if write:
            with _explained_file(path):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        elif not path.is_file():
            raise ResourceError(f"There is no state {path}.", hint="`splitfl serve --state FILE` makes one")
        engine = create_engine(
            self.url, hide_parameters=True, pool_size=1, max_overflow=2, connect_args={"timeout": _BUSY_S}
        )
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin_at_once if write else _begin)
        return engine

    def _claim(self, server: str) -> None:
        """Keep others of this name away, for as long as this is open; the kernel or the server lets go after a kill."""
        problem = ResourceError(
            f"The state {self.place} is in use by another owner{'' if self.is_sqlite else f' called {server!r}'}.",
            hint="end that one first" if self.is_sqlite else "end that one first, or choose another --server-name",
        )
        if self.is_sqlite:
            self._claim_file(problem)
            return
        db = self._held.enter_context(self.engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
        question = text("SELECT pg_try_advisory_lock(:kind, hashtext(:server))")
        deadline = time.monotonic() + _CLAIM_S
        while not db.execute(question, {"kind": _MIGRATION_LOCK, "server": server}).scalar():
            if time.monotonic() > deadline:
                raise problem
            time.sleep(0.05)  # the server may not have noticed yet that the last one was killed

    def _claim_file(self, problem: ResourceError) -> None:
        if os.name != "posix":
            return
        import fcntl

        path = Path(f"{self.place}.lock")
        with _explained_file(path):
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        self._held.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise problem from None

    def _migrate(self, db: Connection) -> None:
        if not self.is_sqlite:  # several owners may start at the same time
            db.execute(text("SELECT pg_advisory_xact_lock(:kind)"), {"kind": _MIGRATION_LOCK})
        migrate(db, self.place)

    def _check(self, db: Connection) -> None:
        version = version_of(db, self.place)
        if version != SCHEMA:
            raise DataError(
                f"{self.place} has schema {version}." if version else f"{self.place} is no state of an owner.",
                expected=f"schema {SCHEMA}",
                hint="start `splitfl serve --state` on it once: that brings it up to date" if version else None,
            )


def url_of(place: str | Path) -> URL:
    """The URL of a path or a URL.

    Raises:
        UsageError: it is no URL, of a database other than SQLite or PostgreSQL, or holds a password.
    """
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
    except ArgumentError as error:
        raise UsageError("--state is no path and no URL of a database.",
                         expected="postgresql+psycopg://USER@HOST/NAME") from error  # fmt: skip
    if url.password or "password" in url.query:
        raise UsageError(
            "--state holds a password, which would stand in process lists and records.",
            expected="a URL without one",
            hint="set PGPASSWORD or use a pgpass file",
        )
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
    if url.get_backend_name() == "sqlite" and url.database:
        return url
    raise UsageError(
        f"--state names a database of another kind: {url.drivername}.",
        expected="a path, or postgresql+psycopg://USER@HOST/NAME",
    )


def _prepare(raw: Any, record: object) -> None:
    """A new SQLite connection: a log that survives a kill and a power cut once a commit has returned."""
    raw.isolation_level = None  # the driver would begin transactions in its own way
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "fullfsync = ON"):
        raw.execute(f"PRAGMA {pragma}")


def _keep_alive(raw: Any, record: object) -> None:
    """Let the server notice within a minute that the machine of an owner has gone, and let go of its name."""
    for name, seconds in (("idle", 30), ("interval", 10), ("count", 3)):
        raw.execute(f"SET tcp_keepalives_{name} = {seconds}")
    raw.commit()


def _begin_at_once(db: Connection) -> None:
    db.exec_driver_sql("BEGIN IMMEDIATE")


def _begin(db: Connection) -> None:
    db.exec_driver_sql("BEGIN")


@contextlib.contextmanager
def _explained_file(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path} cannot be made or written: {error.strerror}.") from error
