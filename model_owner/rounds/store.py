"""The durable state of a federation: one SQLite file. A standing is written whole, in one transaction, or not at all.

SQLite holds what is small: the standing, the facts that all parties share, and how each round ended. Blobs lie beside
it (`vault`), and are on the disk before a standing names them. One process at a time: the file stays locked.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from splitfl.errors import DataError, ResourceError, UsageError
from splitfl.rounds.records import Course, Ended, Record, Standing
from splitfl.wire.round_messages import Facts

APPLICATION_ID = 0x53464C52  # "SFLR"
SCHEMA = 1

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, kept INTEGER NOT NULL, record BLOB NOT NULL, seconds REAL NOT NULL,
    bytes_in INTEGER NOT NULL, bytes_out INTEGER NOT NULL);
"""


class Charter(Record, frozen=True, kw_only=True):
    """What may not change while a federation lasts."""

    sum: str
    rule: str
    stages: tuple[str, ...]
    clip: float
    max_weight: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a round took."""

    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


_encode = msgspec.msgpack.Encoder().encode


class RoundStore:
    """One federation's file, open and locked.

    Args:
        path: the file; made if it is missing.
        charter: compared with the one in the file.
        resume: go on with the federation in the file; without it there must be none.

    Raises:
        UsageError: there is a federation already and `resume` is False, or it was begun with another charter.
        ResourceError: the file is in use, or cannot be made, read or written.
        DataError: it is damaged or something else.
    """

    def __init__(self, path: Path, charter: Charter, *, resume: bool) -> None:
        self.path = path
        self.is_new = not path.exists()
        if not self.is_new and not resume:
            raise UsageError(
                f"There is a federation in {path.parent} already.",
                hint="go on with it by --resume, or name another --state folder",
            )
        with self._explained():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.is_new:
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            with self._explained():
                self._open(charter)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; later use is an error."""
        self._db.close()

    def standing(self) -> Standing:
        """What was written last."""
        with self._explained():
            return msgspec.msgpack.decode(self._value("standing"), type=Standing)

    def facts(self) -> Facts | None:
        """What the parties share; None before the first has entered."""
        with self._explained():
            value = self._find("facts")
            return None if value is None else msgspec.msgpack.decode(value, type=Facts)

    def commit(self, standing: Standing, *, facts: Facts | None = None, cost: Cost | None = None) -> None:
        """Write a standing; when this returns it is on the disk.

        Args:
            standing: the whole of it.
            facts: written too, if given.
            cost: of the round that has just ended, `Standing.last`; None if none has.
        """
        with self._explained(), self._transaction():
            self._set("standing", _encode(standing))
            if facts is not None:
                self._set("facts", _encode(facts))
            if cost is not None and standing.last is not None:
                ended = standing.last
                self._db.execute(
                    "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?)",
                    (ended.round, ended.kept, _encode(ended), cost.seconds, cost.bytes_in, cost.bytes_out),
                )

    def rounds(self) -> list[tuple[Ended, Cost]]:
        """How every round so far ended, in order."""
        with self._explained():
            rows = self._db.execute("SELECT record, seconds, bytes_in, bytes_out FROM rounds ORDER BY round").fetchall()
        return [
            (msgspec.msgpack.decode(record, type=Ended), Cost(seconds=seconds, bytes_in=came, bytes_out=went))
            for record, seconds, came, went in rows
        ]

    # ---- the file

    def _open(self, charter: Charter) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA fullfsync = ON")
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        fresh = application == 0 and not self._db.execute("SELECT name FROM sqlite_master").fetchall()
        if not fresh and (application != APPLICATION_ID or version != SCHEMA):
            raise DataError(f"{self.path} is no state of a federation that this splitfl knows.")
        if self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise ResourceError(f"{self.path} cannot keep a write-ahead log here.", hint="choose a local disk")
        with self._transaction():  # takes the lock, and keeps it
            if fresh:
                self._make(charter)
            elif msgspec.msgpack.decode(self._value("charter"), type=Charter) != charter:
                raise UsageError(
                    f"The federation in {self.path.parent} was begun with another rule, sum, clip or largest weight.",
                    hint="go on with the same ones, or name another --state folder",
                )
        if not fresh and self._db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise DataError(f"{self.path} is damaged: its pages are not in order.")

    def _make(self, charter: Charter) -> None:
        for statement in _TABLES.split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        self._set("charter", _encode(charter))
        self._set("standing", _encode(Standing(federation=secrets.token_hex(16))))

    def _find(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def _value(self, name: str) -> bytes:
        value = self._find(name)
        if value is None:
            raise DataError(f"{self.path} is damaged: it has no {name}.")
        return value

    def _set(self, name: str, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except msgspec.MsgspecError as error:
            raise DataError(f"{self.path} is damaged, or no state of a federation.") from error
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ResourceError(
                    f"The federation in {self.path.parent} is in use by another process.",
                    hint="end that coordinator first",
                ) from error
            raise ResourceError(f"{self.path} cannot be read and written: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path} is damaged, or no state of a federation.") from error
        except (sqlite3.Error, OSError) as error:
            raise ResourceError(f"{self.path} cannot be used: {type(error).__name__}.") from error


def check_course(course: Course, standing: Standing) -> Standing:
    """`standing`, if it can go on along `course`.

    Raises:
        UsageError: more rounds are done than the course has.
    """
    if standing.round > course.rounds:
        raise UsageError(
            f"{standing.round} rounds of this federation are done, and --rounds is {course.rounds}.",
            expected=f"at least {standing.round}",
        )
    if standing.phase == "finished" and standing.round < course.rounds and not standing.reason.startswith("collapsed"):
        return msgspec.structs.replace(standing, phase="gathering", reason="")  # --rounds was raised
    return standing
