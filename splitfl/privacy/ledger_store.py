"""The ledger's file: SQLite in WAL mode, written through to the disk, and what can be wrong with it.

Rules of this file:

- The file appears whole or not at all: it is made under another name and then linked into place. So an empty file is a
  damaged ledger and never a new one, and two processes that begin at the same time end up with one ledger.
- A writer takes the lock before it reads (``BEGIN IMMEDIATE``), so that nobody spends between its look and its charge.
- ``synchronous=FULL``: a commit returns when the write-ahead log is on the disk, not before.
- A connection does not survive a fork: SQLite's locks belong to the process, and a child that used the parent's, or
  opened the same file while the parent has it open, could have the log deleted under it. Both are refused.

While it is open the ledger is three files (``-wal``, ``-shm``); copy all of them, or none. A shared network folder is
no place for it: the log needs memory that all processes share.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitfl.errors import DataError, ResourceError, SplitflError, UsageError

SCHEMA = 1
APPLICATION_ID = 0x73706C46  # "splF"
_KEY_BYTES = 32
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FULL = sqlite3.SQLITE_FULL
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DISK = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE datasets (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, label TEXT);
CREATE TABLE runs (run TEXT PRIMARY KEY, dataset INTEGER NOT NULL REFERENCES datasets) WITHOUT ROWID;
CREATE TABLE budgets (
    dataset INTEGER NOT NULL REFERENCES datasets, channels TEXT NOT NULL, adversary TEXT NOT NULL, unit TEXT NOT NULL,
    epsilon REAL, delta REAL, rho REAL, releases INTEGER, PRIMARY KEY (dataset, channels, adversary)) WITHOUT ROWID;
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY, dataset INTEGER NOT NULL REFERENCES datasets, channels TEXT NOT NULL,
    adversary TEXT NOT NULL, unit TEXT NOT NULL,
    releases INTEGER NOT NULL DEFAULT 0, unbounded INTEGER NOT NULL DEFAULT 0, confirmed INTEGER NOT NULL DEFAULT 0,
    units INTEGER NOT NULL DEFAULT 0,          -- rows of totals
    most_releases INTEGER NOT NULL DEFAULT 0,  -- of any row of totals, and so on: totals only ever grow
    most_rho REAL NOT NULL DEFAULT 0, most_unbounded INTEGER NOT NULL DEFAULT 0,
    all_releases INTEGER NOT NULL DEFAULT 0,   -- releases of every unit, which count on top of each row of totals
    all_rho REAL NOT NULL DEFAULT 0, all_unbounded INTEGER NOT NULL DEFAULT 0,
    UNIQUE (dataset, channels, adversary, unit));
CREATE TABLE totals (
    account INTEGER NOT NULL REFERENCES accounts, unit BLOB NOT NULL,
    releases INTEGER NOT NULL, rho REAL NOT NULL, unbounded INTEGER NOT NULL,
    PRIMARY KEY (account, unit)) WITHOUT ROWID;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, release_id TEXT NOT NULL UNIQUE, account INTEGER NOT NULL REFERENCES accounts,
    units BLOB,                                -- sorted keyed hashes, one after the other; NULL for every unit
    channel TEXT NOT NULL, mechanism TEXT NOT NULL, sensitivity REAL, sigma REAL, rho REAL,
    run TEXT NOT NULL, charged REAL NOT NULL, confirmed REAL);
"""

_open_here: list[tuple[int, str]] = []  # (process id, real path) of every store that is open; a fork copies it


class Store:
    """One ledger file, open. Any number of threads may use it: they take turns, as SQLite's writers do anyway.

    Args:
        path: the file.
        timeout_s: longest wait for other processes.
        create: make the file if it is missing.

    Raises:
        ResourceError: the file is locked beyond `timeout_s`, or cannot be made, read or written.
        DataError: the file is missing (without `create`), damaged, no ledger, or of a newer schema.
        UsageError: the process that this one was forked from has it open.
    """

    def __init__(self, path: Path, *, timeout_s: float, create: bool) -> None:
        self.path, self._timeout_s = Path(path), timeout_s
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._db: sqlite3.Connection | None = None
        real = os.path.realpath(self.path)
        if any(process != self._process and opened == real for process, opened in _open_here):
            raise _forked(self.path)
        try:
            if not os.path.lexists(self.path):
                if not create:
                    raise DataError(
                        f"There is no ledger {self.path}.", hint="name another with --ledger, or set SPLITFL_LEDGER"
                    )
                _make(self.path)
            self._db = self._connect()
            self.key: bytes = self._db.execute("SELECT value FROM meta WHERE name = 'key'").fetchone()[0]
            status = os.stat(self.path)
        except (sqlite3.Error, OSError) as error:
            self._drop()
            raise explain(error, self.path, timeout_s) from error
        except BaseException:
            self._drop()
            raise
        self._inode = (status.st_dev, status.st_ino)
        self._mark = (self._process, real)
        _open_here.append(self._mark)

    def close(self) -> None:
        """Close the file; later use is an error. Closing again does nothing."""
        with self._lock:
            if self._db is not None and self._process == os.getpid():
                self._drop()
                _open_here.remove(self._mark)

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one state of the ledger and writes nothing."""
        with self._turn("BEGIN") as db:
            yield db

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes beside; when the block ends it is on the disk.

        An exception in the block undoes it.

        Args:
            durable: False for what may be lost with the power (never out of order, and never with the process).
        """
        with self._turn("BEGIN IMMEDIATE", durable) as db:
            yield db

    @contextmanager
    def _turn(self, begin: str, durable: bool = True) -> Iterator[sqlite3.Connection]:
        if self._process != os.getpid():
            raise _forked(self.path)
        with self._lock:
            if self._db is None:
                raise UsageError(f"The ledger {self.path} is closed.")
            try:
                if not durable:
                    self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute(begin)
                self._check_place()
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise explain(error, self.path, self._timeout_s) from error
                raise
            finally:
                if not durable:
                    self._db.execute("PRAGMA synchronous = FULL")

    def _check_place(self) -> None:
        """What goes into a file that was moved or deleted while it was open would be lost to the next run."""
        try:
            status = os.stat(self.path)
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._inode:
            raise ResourceError(
                f"The ledger {self.path} was moved, deleted or replaced while it was in use. Nothing was charged.",
                hint="put it back, with its -wal file, and start again",
            )

    def _connect(self) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri() + "?mode=rw"  # never makes a file
        self._db = db = sqlite3.connect(
            uri, uri=True, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
        )
        db.row_factory = sqlite3.Row
        _check_file(db, self.path)
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_mode & 0o077:
                os.chmod(self.path, 0o600)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA fullfsync = ON")  # where fsync alone does not reach the disk (macOS); nothing elsewhere
        db.execute("PRAGMA foreign_keys = ON")
        return db

    def _drop(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None


def _make(path: Path) -> None:
    """Make a new ledger at `path`, unless somebody else does so first."""
    log = Path(f"{path}-wal")
    if os.path.lexists(log) and not os.path.lexists(path):  # SQLite would take it for the log of the new file
        raise DataError(
            f"The ledger {path} is gone, but its log {log.name} is still there: charges were lost with it.",
            hint=f"put the ledger back beside its log; or move {log.name} away as well, to begin a new ledger",
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".ledger-", dir=path.parent)  # mode 0600, which -wal and -shm take over
    os.close(handle)
    try:
        db = sqlite3.connect(name, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = FULL")
            header = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA};"
            db.executescript(f"BEGIN; {header} {_TABLES}")
            db.execute("INSERT INTO meta VALUES ('key', ?)", (os.urandom(_KEY_BYTES),))
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")
        finally:
            db.close()
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(name + suffix).unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_file(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is no ledger, one of a newer schema, and one whose pages are not in order."""
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    page = db.execute("PRAGMA page_size").fetchone()[0]
    size = path.stat().st_size
    if size < page or size % page:  # which SQLite takes for an empty file, or fills up with zeros
        raise _damaged(path, "it is empty" if size == 0 else "its end is missing")
    if application != APPLICATION_ID:
        raise DataError(
            f"{path} is an SQLite file, but no ledger.", hint="name another file with --ledger, or set SPLITFL_LEDGER"
        )
    if version > SCHEMA:
        raise DataError(
            f"The ledger {path} was written by a newer splitfl (schema {version}).",
            expected=f"schema {SCHEMA}, which this one knows",
            hint="update splitfl; the file is kept as it is",
        )
    if version != SCHEMA:
        raise _damaged(path, "its schema has no number")
    if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise _damaged(path, "its pages are not in order")
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise ResourceError(f"The ledger {path} cannot keep a write-ahead log here.", hint="move it to a local disk")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"The ledger {path} is damaged: {why}. The file is kept as it is, and nothing can be charged.",
        hint="put a copy of it back; or move it away, and give each data set a new budget that leaves out what it has "
        "released already (a run's own record says how often)",
    )


def _forked(path: Path) -> UsageError:
    return UsageError(
        f"The ledger {path} was opened by the process that this one was forked from.",
        hint="start the process with the method spawn, or open the ledger after the fork only",
    )


def explain(error: sqlite3.Error | OSError, path: Path, timeout_s: float) -> SplitflError:
    """What to tell a person about an error of SQLite or of the file system."""
    if isinstance(error, OSError):
        return ResourceError(
            f"The ledger {path} cannot be kept there: {error.strerror}.",
            hint="name a place on a local disk that you may write to, with --ledger or SPLITFL_LEDGER",
        )
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # the high bits say more, and are not needed
    if code in _BUSY:
        return ResourceError(
            f"The ledger {path} was locked by another process for more than {timeout_s:g} s. Nothing was charged.",
            hint="end the process that holds it, or wait for it; nothing may be sent without a charge",
        )
    if code == _FULL:
        return ResourceError(
            f"The disk is full: the ledger {path} could not be written. Nothing was charged.", hint="free some space"
        )
    if code == sqlite3.SQLITE_NOTADB:
        return _damaged(path, "it does not begin as a ledger does")
    if code in _DAMAGED:
        return _damaged(path, "its pages are not in order")
    if code in _DISK:
        return ResourceError(
            f"The ledger {path} cannot be read and written: {error}.",
            hint="check the disk, and that you may write to the file and its folder",
        )
    if "no such table" in str(error) or "no such column" in str(error):
        return _damaged(path, "a table is missing")
    return ResourceError(f"The ledger {path} cannot be used: {type(error).__name__}.", hint="run again with --debug")
