"""One batch goes into the database: in one transaction, and once."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, bindparam, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from model_owner.state.pending import Pending
from model_owner.state.schema import CHARGES, COUNTED, PARTIES, SESSIONS, USAGE, WRITERS
from splitfl.errors import ResourceError


def begin_run(db: Connection, server: str, run: str) -> None:
    """From now on, batches of `run` are those that count for `server`; what an earlier run left open was lost.

    A lost session ended, as far as is known, when its seconds were booked last.
    """
    db.execute(
        update(SESSIONS)
        .where(SESSIONS.c.server == server, SESSIONS.c.ended.is_(None))
        .values(ended=SESSIONS.c.opened + SESSIONS.c.seconds, why="lost")
    )
    statement = _insert(db, WRITERS).values(server=server, run=run, batch=0)
    db.execute(statement.on_conflict_do_update(index_elements=["server"], set_={"run": run, "batch": 0}))


def write(db: Connection, batch: Pending, number: int, server: str, run: str) -> dict[str, int]:
    """Write a batch, unless it is there already: the answer to a commit may have been lost.

    Returns:
        What parties have spent in all: those that were charged, and where other owners write as well, all.

    Raises:
        ResourceError: another process writes for this server by now.
    """
    mine = (WRITERS.c.server == server) & (WRITERS.c.run == run)
    first = db.execute(update(WRITERS).where(mine, WRITERS.c.batch == number - 1).values(batch=number)).rowcount
    if first:
        _write_sessions(db, batch)
        _write_sums(db, batch)
    elif db.execute(select(WRITERS.c.batch).where(mine)).scalar() != number:
        raise ResourceError(
            f"Another owner writes as {server!r} to the same state.", hint="end one of them, or use --server-name"
        )
    question = select(CHARGES)
    if db.dialect.name == "sqlite":
        question = question.where(CHARGES.c.party.in_(list(batch.charges)))
    return {row.party: row.tokens for row in db.execute(question)}


def _write_sessions(db: Connection, batch: Pending) -> None:
    if batch.opened:
        db.execute(SESSIONS.insert(), list(batch.opened.values()))
    if batch.sums:
        added = {name: SESSIONS.c[name] + bindparam(f"add_{name}") for name in (*COUNTED, "seconds")}
        db.execute(
            update(SESSIONS).where(SESSIONS.c.name == bindparam("which")).values(added),
            [{"which": name} | {f"add_{key}": n for key, n in sums.items()} for name, sums in batch.sums.items()],
        )
    if batch.ended:
        db.execute(
            update(SESSIONS).where(SESSIONS.c.name == bindparam("which")).values(
                ended=bindparam("at"), why=bindparam("because")),
            [{"which": name, "at": at, "because": why} for name, (at, why) in batch.ended.items()],
        )  # fmt: skip


def _write_sums(db: Connection, batch: Pending) -> None:
    if batch.usage:
        rows = [{"party": party, "day": day} | sums for (party, day), sums in sorted(batch.usage.items())]
        _add(db, USAGE, ["party", "day"], ["sessions", "session_seconds", *COUNTED], rows)
    if batch.charges:
        rows = [{"party": party, "tokens": tokens} for party, tokens in sorted(batch.charges.items())]
        _add(db, CHARGES, ["party"], ["tokens"], rows)
    if batch.seen:
        statement = _insert(db, PARTIES)
        later = statement.on_conflict_do_update(
            index_elements=["fingerprint", "party"],
            set_={"last_seen": _greatest(db)(PARTIES.c.last_seen, statement.excluded.last_seen)},
        )
        db.execute(
            later,
            [{"fingerprint": fingerprint, "party": party, "first_seen": first, "last_seen": last}
             for (fingerprint, party), (first, last) in sorted(batch.seen.items())],
        )  # fmt: skip


def _add(db: Connection, table: Table, keys: list[str], sums: list[str], rows: list[dict[str, Any]]) -> None:
    """Add to rows that may be there; in the order of their keys, so that two owners never wait for each other."""
    statement = _insert(db, table)
    more = {name: table.c[name] + statement.excluded[name] for name in sums}
    db.execute(statement.on_conflict_do_update(index_elements=keys, set_=more), rows)


def _insert(db: Connection, table: Table) -> Any:
    return (sqlite if db.dialect.name == "sqlite" else postgresql).insert(table)


def _greatest(db: Connection) -> Any:
    return func.max if db.dialect.name == "sqlite" else func.greatest
