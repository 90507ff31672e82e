"""What is read from an owner's state: who used how much, who is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select

from model_owner.state.database import Database
from model_owner.state.schema import CHARGES, COUNTED, PARTIES, SESSIONS, USAGE

SUMMED = ("sessions", "session_seconds", *COUNTED)
"""Columns of usage, in the order in which they are exported."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one party used on one day, or on all days asked for."""

    party: str
    day: str | None
    """None where days were added up."""
    sums: dict[str, float]
    """By `SUMMED`."""


@dataclass(frozen=True, kw_only=True)
class PartyNow:
    """One party, as `splitfl status` shows it."""

    party: str
    keys: int
    """Keys that it has used."""
    first_seen: float
    last_seen: float
    open_sessions: int
    spent_tokens: int
    today: dict[str, float]
    """By `SUMMED`; zeros if it has not been here today."""


def usage(database: Database, first: str | None = None, last: str | None = None, *, by_day: bool = True) -> list[Usage]:
    """What each party used, from day `first` to day `last`, both included.

    Raises:
        ResourceError, DataError: as for `Database`.
    """
    keys = [USAGE.c.party, USAGE.c.day] if by_day else [USAGE.c.party]
    question: Select[Any] = select(*keys, *(func.sum(USAGE.c[name]).label(name) for name in SUMMED))
    if first is not None:
        question = question.where(USAGE.c.day >= first)
    if last is not None:
        question = question.where(USAGE.c.day <= last)
    with database.explained(), database.engine.begin() as db:
        rows = db.execute(question.group_by(*keys).order_by(*keys)).mappings().all()
    return [
        Usage(party=row["party"], day=row.get("day"), sums={name: _number(row[name]) for name in SUMMED})
        for row in rows
    ]


def parties(database: Database, today: str) -> list[PartyNow]:
    """Every party that was ever here, by name.

    Raises:
        ResourceError, DataError: as for `Database`.
    """
    here = (
        select(SESSIONS.c.party, func.count().label("n")).where(SESSIONS.c.ended.is_(None)).group_by(SESSIONS.c.party)
    )
    known = select(
        PARTIES.c.party, func.count().label("keys"), func.min(PARTIES.c.first_seen).label("first_seen"),
        func.max(PARTIES.c.last_seen).label("last_seen"),
    ).group_by(PARTIES.c.party)  # fmt: skip
    with database.explained(), database.engine.begin() as db:
        opened = {row.party: row.n for row in db.execute(here.group_by(SESSIONS.c.party))}
        spent = {row.party: row.tokens for row in db.execute(select(CHARGES))}
        rows = db.execute(known.order_by(PARTIES.c.party)).all()
    used = {one.party: one.sums for one in usage(database, today, today)}
    nothing = dict.fromkeys(SUMMED, 0.0)
    return [
        PartyNow(
            party=row.party, keys=row.keys, first_seen=row.first_seen, last_seen=row.last_seen,
            open_sessions=opened.get(row.party, 0), spent_tokens=spent.get(row.party, 0),
            today=used.get(row.party, nothing),
        )
        for row in rows
    ]  # fmt: skip


def _number(value: Any) -> float:
    """PostgreSQL adds whole numbers up to a decimal."""
    return value if isinstance(value, float) else int(value)
