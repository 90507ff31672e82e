"""Charging, step by step: find the account, add up what its units have spent, compare with the budget, write it down.

Every function runs inside one writing transaction of `splitfl.privacy.ledger_store`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

from splitfl.errors import UsageError, printable
from splitfl.privacy.ledger_budget import Budget, refusal
from splitfl.privacy.ledger_records import GROUP_WORDS, Release, Spent, short_name
from splitfl.privacy.ledger_report import budget_of, most_of, spent_by_all

ENTRY = "SELECT e.*, a.channels, a.adversary, a.unit, d.fingerprint AS dataset FROM entries e JOIN accounts a "
ENTRY += "ON a.id = e.account JOIN datasets d ON d.id = a.dataset WHERE e.release_id = ?"


def dataset_number(db: sqlite3.Connection, fingerprint: str) -> int:
    """The data set's row number, made if it is missing."""
    db.execute("INSERT OR IGNORE INTO datasets (fingerprint) VALUES (?)", (fingerprint,))
    return int(db.execute("SELECT id FROM datasets WHERE fingerprint = ?", (fingerprint,)).fetchone()[0])


def account_of(db: sqlite3.Connection, dataset: str, group: str, adversary: str, unit: str) -> sqlite3.Row:
    """The account's row, made if it is missing."""
    key = (dataset_number(db, dataset), group, adversary, unit)
    find = "SELECT * FROM accounts WHERE dataset = ? AND channels = ? AND adversary = ? AND unit = ?"
    row: sqlite3.Row | None = db.execute(find, key).fetchone()
    if row is not None:
        return row
    db.execute("INSERT INTO accounts (dataset, channels, adversary, unit) VALUES (?, ?, ?, ?)", key)
    made: sqlite3.Row = db.execute(find, key).fetchone()
    return made


def totals_of(db: sqlite3.Connection, account: sqlite3.Row, units: Sequence[bytes] | None) -> list[Spent | None]:
    """What each unit has spent by being named, None before its first time; no list for a release of every unit."""
    find = "SELECT releases, rho, unbounded FROM totals WHERE account = ? AND unit = ?"
    rows = (db.execute(find, (account["id"], unit)).fetchone() for unit in units or ())
    return [None if row is None else Spent(**dict(row)) for row in rows]


def with_all(account: sqlite3.Row, units: Sequence[bytes] | None, totals: Sequence[Spent | None]) -> list[Spent]:
    """What each unit has spent in all; for a release of every unit, the most that any has."""
    of_all = spent_by_all(account)
    if units is None:
        return [most_of(account) + of_all]
    return [(each or Spent()) + of_all for each in totals]


def check_budget(
    db: sqlite3.Connection, account: sqlite3.Row, release: Release, spent: Sequence[Spent], times: int
) -> Budget | None:
    """The budget of the account, None if it has none.

    Raises:
        BudgetError: `times` such releases do not fit in it.
        UsageError: it is for another unit.
    """
    find = "SELECT * FROM budgets WHERE dataset = ? AND channels = ? AND adversary = ?"
    row = db.execute(find, (account["dataset"], release.group, release.adversary)).fetchone()
    if row is None:
        return None
    label = db.execute("SELECT label FROM datasets WHERE id = ?", (account["dataset"],)).fetchone()[0]
    name, budget = short_name(release.dataset, label), budget_of(row)
    if budget.unit != release.unit:
        raise UsageError(
            f"The budget of {name} ({GROUP_WORDS[release.group]}) is for each {budget.unit}; this release is counted "
            f"by {release.unit}, which it would not see.",
            hint=f"set a budget with --unit {release.unit!r}, or count releases by {budget.unit}",
        )
    refused = refusal(release, name, budget, spent, times=times)
    if refused is not None:
        raise refused
    return budget


def enter(
    db: sqlite3.Connection,
    account: sqlite3.Row,
    release: Release,
    units: Sequence[bytes] | None,
    totals: Sequence[Spent | None],
) -> None:
    """Write the entry and add to the totals."""
    number = account["id"]
    added = Spent(releases=1, rho=release.rho or 0.0, unbounded=int(release.rho is None))
    packed = None if units is None else b"".join(units)
    columns = (release.channel, release.mechanism, release.sensitivity, release.sigma, release.rho, release.run)
    db.execute(
        "INSERT INTO entries (release_id, account, units, channel, mechanism, sensitivity, sigma, rho, run, charged) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (release.release_id, number, packed, *columns, time.time()),
    )
    update = "UPDATE accounts SET releases = releases + 1, unbounded = unbounded + ?, "
    if units is None:
        update += "all_releases = all_releases + 1, all_rho = all_rho + ?, all_unbounded = all_unbounded + ? "
        db.execute(update + "WHERE id = ?", (added.unbounded, added.rho, added.unbounded, number))
        return
    sums = [(each or Spent()) + added for each in totals]
    rows = [(number, unit, each.releases, each.rho, each.unbounded) for unit, each in zip(units, sums, strict=True)]
    db.executemany("INSERT OR REPLACE INTO totals VALUES (?, ?, ?, ?, ?)", rows)
    update += "units = units + ?, most_releases = max(most_releases, ?), most_rho = max(most_rho, ?), "
    most = (max(s.releases for s in sums), max(s.rho for s in sums), max(s.unbounded for s in sums))
    new = sum(each is None for each in totals)
    db.execute(update + "most_unbounded = max(most_unbounded, ?) WHERE id = ?", (added.unbounded, new, *most, number))


def check_same(stored: sqlite3.Row, release: Release, units: Sequence[bytes] | None) -> None:
    """Refuse a replay with other contents: it is not a replay."""
    fields = ("dataset", "unit", "channel", "mechanism", "sensitivity", "sigma", "rho", "adversary", "run")
    other = [name for name in fields if stored[name] != getattr(release, name)]
    if stored["units"] != (None if units is None else b"".join(units)):
        other.append("units")
    if other:
        raise UsageError(
            f"Another release has the id {printable(release.release_id)}: it differs in {', '.join(other)}.",
            expected="for a retry, exactly the release that was charged; for another release, another id",
        )
