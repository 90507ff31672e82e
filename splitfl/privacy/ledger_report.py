"""Reading the ledger's tables: accounts as they stand, everything as JSON, and the sums done again.

Every function runs inside a transaction of `splitfl.privacy.ledger_store`.
"""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from splitfl.privacy.ledger_budget import Budget
from splitfl.privacy.ledger_records import NEIGHBOURS, Spent, short_name
from splitfl.privacy.ledger_store import SCHEMA

HASH_BYTES = 16
_ACCOUNTS = """
SELECT a.*, d.fingerprint, d.label FROM accounts a JOIN datasets d ON d.id = a.dataset
ORDER BY d.label, d.fingerprint, a.channels DESC, a.adversary, a.unit"""
_ENTRIES = """
SELECT e.*, d.fingerprint, a.adversary, a.unit FROM entries e JOIN accounts a ON a.id = e.account
JOIN datasets d ON d.id = a.dataset ORDER BY e.id"""
_PLAIN = ("release_id", "channel", "mechanism", "sensitivity", "sigma", "rho", "run", "charged", "confirmed")


@dataclass(frozen=True, kw_only=True)
class Account:
    """One account as it stands: everything that one adversary has had of one data set in one group of channels."""

    dataset: str
    label: str | None
    """What people call the data set, such as its file's name."""
    group: str
    adversary: str
    unit: str
    releases: int
    """All of them, of whatever units."""
    most: Spent
    """What the unit that is worst off has spent; the counts and rho may be those of different units."""
    units: int
    """Units that were named in releases, each counted once."""
    of_all: int
    """Releases among `releases` that concerned every unit of the data set."""
    unbounded: int
    """Releases without a formal bound."""
    confirmed: int
    """Releases that an answer came to."""
    budget: Budget | None
    empirical: str | None
    """Why nothing formal can be said; None where it can."""

    @property
    def left(self) -> tuple[int | None, float | None]:
        """Releases and rho that are left to the unit that is worst off, each None where it has no limit."""
        return (None, None) if self.budget is None else self.budget.left(self.most)

    @property
    def name(self) -> str:
        """The data set, as short as people want it."""
        return short_name(self.dataset, self.label)


def spent_by_all(account: sqlite3.Row) -> Spent:
    """What releases of every unit have spent; it counts on top of what a unit was named for."""
    return Spent(releases=account["all_releases"], rho=account["all_rho"], unbounded=account["all_unbounded"])


def most_of(account: sqlite3.Row) -> Spent:
    """The most that any unit has spent by being named."""
    return Spent(releases=account["most_releases"], rho=account["most_rho"], unbounded=account["most_unbounded"])


def budget_of(row: sqlite3.Row) -> Budget:
    """A row of `budgets`."""
    return Budget(**{name: row[name] for name in ("unit", "rho", "epsilon", "delta", "releases")})


def accounts(db: sqlite3.Connection) -> list[Account]:
    """Every account that has releases or a budget."""
    rows_of = db.execute("SELECT * FROM budgets")
    budgets = {(row["dataset"], row["channels"], row["adversary"]): budget_of(row) for row in rows_of}
    beside: dict[tuple[Any, ...], list[sqlite3.Row]] = defaultdict(list)
    for row in db.execute(_ACCOUNTS):
        beside[row["dataset"], row["channels"], row["adversary"]].append(row)
    found = []
    for key, rows in beside.items():
        budget, reason = budgets.get(key), _empirical(rows)
        for row in rows:
            own = budget if budget is not None and budget.unit == row["unit"] else None
            if row["releases"] or own is not None:
                found.append(_read(row, own, reason))
    return found


def _read(row: sqlite3.Row, budget: Budget | None, reason: str | None) -> Account:
    counts = {name: row[name] for name in ("label", "adversary", "unit", "releases", "units", "unbounded", "confirmed")}
    return Account(
        dataset=row["fingerprint"],
        group=row["channels"],
        most=most_of(row) + spent_by_all(row),
        of_all=row["all_releases"],
        budget=budget,
        empirical=reason,
        **counts,
    )


def _empirical(rows: list[sqlite3.Row]) -> str | None:
    """Why nothing formal can be said about what one adversary has had in one group of channels."""
    used = [row for row in rows if row["releases"]]
    unbounded, releases = sum(row["unbounded"] for row in used), sum(row["releases"] for row in used)
    if unbounded:
        return f"{unbounded} of {releases} releases had no formal bound"
    if len(used) > 1:
        return f"releases were counted by {' and by '.join(row['unit'] for row in used)}, which do not add up"
    return None


def everything(db: sqlite3.Connection, *, units: bool) -> dict[str, Any]:
    """The whole ledger as JSON can hold it; never the key."""
    return {
        "format": "splitfl ledger",
        "schema": SCHEMA,
        "neighbours": NEIGHBOURS,
        "datasets": [dict(row) for row in db.execute("SELECT fingerprint, label FROM datasets ORDER BY fingerprint")],
        "accounts": [asdict(account) for account in accounts(db)],
        "entries": [_entry(row, units) for row in db.execute(_ENTRIES)],
    }


def _entry(row: sqlite3.Row, units: bool) -> dict[str, Any]:
    entry = {"dataset": row["fingerprint"], "adversary": row["adversary"], "unit": row["unit"]}
    entry |= {name: row[name] for name in _PLAIN}
    hashes = None if row["units"] is None else [each.hex() for each in _split(row["units"])]
    entry["unit_count"] = None if hashes is None else len(hashes)
    return entry | ({"units": hashes} if units else {})


def _split(packed: bytes) -> Iterator[bytes]:
    return (packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES))


def mismatches(db: sqlite3.Connection) -> list[str]:
    """Totals that are not what the entries add up to, in words that name no unit."""
    units: dict[tuple[int, bytes], Spent] = defaultdict(Spent)
    of_all: dict[int, Spent] = defaultdict(Spent)
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in db.execute("SELECT account, units, rho, confirmed FROM entries ORDER BY id"):
        number, one = row["account"], Spent(releases=1, rho=row["rho"] or 0.0, unbounded=int(row["rho"] is None))
        more = (1, one.unbounded, row["confirmed"] is not None)
        counts[number] = [a + b for a, b in zip(counts[number], more, strict=True)]
        if row["units"] is None:
            of_all[number] += one
        for unit in _split(row["units"] or b""):
            units[number, unit] += one
    wrong, left = [], dict(units)
    for row in db.execute("SELECT * FROM totals"):
        if not _equal(left.pop((row["account"], row["unit"]), Spent()), _spent(row)):
            wrong.append(f"a unit of account {row['account']}")
    wrong += [f"a unit of account {number} is missing" for number, _ in left]
    most: dict[int, list[Spent]] = defaultdict(list)
    for (number, _), spent in units.items():
        most[number].append(spent)
    for row in db.execute("SELECT * FROM accounts"):
        number = row["id"]
        named = most[number]
        sums = Spent(
            releases=max((each.releases for each in named), default=0),
            rho=max((each.rho for each in named), default=0.0),
            unbounded=max((each.unbounded for each in named), default=0),
        )
        kept = [row["releases"], row["unbounded"], row["confirmed"], row["units"]]
        if kept != [*counts[number], len(named)]:
            wrong.append(f"the counts of account {number}")
        if not (_equal(sums, most_of(row)) and _equal(of_all[number], spent_by_all(row))):
            wrong.append(f"the sums of account {number}")
    return wrong


def _spent(row: sqlite3.Row) -> Spent:
    return Spent(releases=row["releases"], rho=row["rho"], unbounded=row["unbounded"])


def _equal(one: Spent, other: Spent) -> bool:
    counts = (one.releases, one.unbounded) == (other.releases, other.unbounded)
    return counts and math.isclose(one.rho, other.rho, rel_tol=1e-9, abs_tol=0.0)
