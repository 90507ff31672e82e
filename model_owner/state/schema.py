"""The tables of the owner's state, their version, and the way from each earlier version to this one.

Times are seconds since 1970 (UTC), days are ``YYYY-MM-DD`` in UTC. A party is known by its name on the allow-list,
since that is who pays; which keys it used is in `parties`, by fingerprint. No key, row or tensor is ever in here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sqlalchemy import BigInteger, Column, Connection, Float, Index, MetaData, String, Table, inspect, text

from splitfl.errors import DataError

SCHEMA = 2
"""Version of the tables below."""
COUNTED = ("tokens_forward", "tokens_backward", "tokens_decode", "bytes_in", "bytes_out", "requests", "steps")
"""Whole numbers that are added up, for a session and for a party and day."""

METADATA = MetaData()
META = Table(
    "splitfl_state", METADATA, Column("name", String, primary_key=True), Column("value", String, nullable=False)
)
"""One row, ``schema``."""


def _counted() -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False, server_default="0") for name in COUNTED]


PARTIES = Table(
    "parties", METADATA,
    Column("fingerprint", String, primary_key=True), Column("party", String, primary_key=True),
    Column("first_seen", Float, nullable=False), Column("last_seen", Float, nullable=False),
)  # fmt: skip
SESSIONS = Table(
    "sessions", METADATA,
    Column("name", String, primary_key=True), Column("server", String, nullable=False),
    Column("party", String, nullable=False), Column("fingerprint", String, nullable=False),
    Column("protocol", String, nullable=False), Column("wire_dtype", String, nullable=False),
    Column("opened", Float, nullable=False), Column("ended", Float), Column("why", String),
    Column("seconds", Float, nullable=False, server_default="0"), *_counted(),
    Index("sessions_by_party", "party", "opened"),
)  # fmt: skip
USAGE = Table(
    "usage", METADATA,
    Column("party", String, primary_key=True), Column("day", String, primary_key=True),
    Column("sessions", BigInteger, nullable=False, server_default="0"),
    Column("session_seconds", Float, nullable=False, server_default="0"), *_counted(),
)  # fmt: skip
CHARGES = Table(
    "charges", METADATA, Column("party", String, primary_key=True), Column("tokens", BigInteger, nullable=False)
)
"""What each party has used up of its query budget, over all time."""
WRITERS = Table(
    "writers", METADATA,
    Column("server", String, primary_key=True), Column("run", String, nullable=False),
    Column("batch", BigInteger, nullable=False),
)  # fmt: skip
"""The last batch that each server has written: one whose outcome was never heard of is not written twice."""

Migration: TypeAlias = Callable[[Connection], None]


def _first(db: Connection) -> None:
    """Version 1: parties, sessions, and usage without a difference between forward, backward and decode."""
    for statement in (
        "CREATE TABLE splitfl_state (name VARCHAR PRIMARY KEY, value VARCHAR NOT NULL)",
        "CREATE TABLE parties (fingerprint VARCHAR NOT NULL, party VARCHAR NOT NULL, first_seen FLOAT NOT NULL, "
        "last_seen FLOAT NOT NULL, PRIMARY KEY (fingerprint, party))",
        "CREATE TABLE sessions (name VARCHAR PRIMARY KEY, server VARCHAR NOT NULL, party VARCHAR NOT NULL, "
        "fingerprint VARCHAR NOT NULL, protocol VARCHAR NOT NULL, wire_dtype VARCHAR NOT NULL, opened FLOAT NOT NULL, "
        "ended FLOAT, why VARCHAR, seconds FLOAT NOT NULL DEFAULT 0, tokens BIGINT NOT NULL DEFAULT 0, "
        "bytes_in BIGINT NOT NULL DEFAULT 0, bytes_out BIGINT NOT NULL DEFAULT 0, "
        "requests BIGINT NOT NULL DEFAULT 0, steps BIGINT NOT NULL DEFAULT 0)",
        "CREATE TABLE usage (party VARCHAR NOT NULL, day VARCHAR NOT NULL, sessions BIGINT NOT NULL DEFAULT 0, "
        "session_seconds FLOAT NOT NULL DEFAULT 0, tokens BIGINT NOT NULL DEFAULT 0, "
        "bytes_in BIGINT NOT NULL DEFAULT 0, bytes_out BIGINT NOT NULL DEFAULT 0, "
        "requests BIGINT NOT NULL DEFAULT 0, steps BIGINT NOT NULL DEFAULT 0, PRIMARY KEY (party, day))",
        "INSERT INTO splitfl_state VALUES ('schema', '1')",
    ):
        db.execute(text(statement))


def _second(db: Connection) -> None:
    """Version 2: tokens by kind of work, budgets, writers.

    What was served before counts as forward, and against a budget: who had been served a million tokens does not begin
    again from nothing.
    """
    for table in ("sessions", "usage"):
        db.execute(text(f"ALTER TABLE {table} RENAME COLUMN tokens TO tokens_forward"))
        for name in ("tokens_backward", "tokens_decode"):
            db.execute(text(f"ALTER TABLE {table} ADD COLUMN {name} BIGINT NOT NULL DEFAULT 0"))
    db.execute(text("CREATE INDEX sessions_by_party ON sessions (party, opened)"))
    db.execute(text("CREATE TABLE charges (party VARCHAR PRIMARY KEY, tokens BIGINT NOT NULL)"))
    db.execute(text("INSERT INTO charges SELECT party, SUM(tokens_forward) FROM usage GROUP BY party"))
    db.execute(text("CREATE TABLE writers (server VARCHAR PRIMARY KEY, run VARCHAR NOT NULL, batch BIGINT NOT NULL)"))


MIGRATIONS: tuple[Migration, ...] = (_first, _second)
"""Entry N goes from version N to N + 1. Once released, an entry does not change."""


def version_of(db: Connection, place: str) -> int:
    """The version of the tables there; 0 if there are none.

    Raises:
        DataError: the database holds something else, or was written by a newer splitfl.
    """
    tables = inspect(db).get_table_names()
    if META.name not in tables:
        if set(tables) & set(METADATA.tables):
            raise DataError(f"{place} holds tables that are no state of an owner.", hint="name another --state")
        return 0
    value = db.execute(META.select().where(META.c.name == "schema")).first()
    if value is None or not str(value.value).isdecimal():
        raise DataError(f"{place} is no state of an owner: it does not say of which version.")
    version = int(value.value)
    if version > SCHEMA:
        raise DataError(
            f"{place} was written by a newer splitfl: it has schema {version}.",
            expected=f"at most schema {SCHEMA}",
            hint="install that splitfl again, or name another --state",
        )
    return version


def migrate(db: Connection, place: str, *, to: int = SCHEMA) -> None:
    """Bring the tables to version `to`, in the transaction of `db`: all steps or none.

    Raises:
        DataError: as `version_of`.
    """
    for version in range(version_of(db, place), to):
        MIGRATIONS[version](db)
        db.execute(META.update().where(META.c.name == "schema").values(value=str(version + 1)))
