"""The ledger: a durable record of every release of private rows, which refuses past a budget.

How a party uses it, in this order and no other:

    ledger.charge(release)     on the disk when it returns; False if this very release was charged before
    ... send the bytes ...     after a crash: the same bytes again, under the same release id
    ledger.confirm(id)         an answer came; for information alone

A crash between charge and send leaves a charge for bytes that never left: too much is counted, never too little. Every
send of a row is a release: each epoch, each evaluation pass, activations and gradients alike
(`splitfl.privacy.ledger_records` says how they add up). Charging n units touches n rows of a table of totals, whatever
has been charged before.

Hides: which row or person an entry is about, in an export; units are kept as BLAKE2b hashes under a random key.
Does not hide: that from whoever reads the file and can guess row numbers or names, for the key is in it. The file has
mode 0600 and stays on the data holder's machine, as do the data sets' fingerprints in it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from splitfl.errors import DataError, UsageError, nearest, printable
from splitfl.privacy import ledger_book as book
from splitfl.privacy import ledger_report as report
from splitfl.privacy.ledger_budget import Budget, BudgetError, make_budget, rho_for
from splitfl.privacy.ledger_records import (
    GROUPS,
    UNITS,
    Release,
    Spent,
    check_adversary,
    check_choice,
    check_dataset,
    check_text,
    short_name,
)
from splitfl.privacy.ledger_report import Account
from splitfl.privacy.ledger_store import Store

__all__ = ["Account", "Budget", "BudgetError", "Ledger", "Release", "Spent", "default_path", "rho_for"]

_HASH_BYTES = report.HASH_BYTES


def default_path() -> Path:
    """Where the ledger is: ``$SPLITFL_LEDGER``, else ``splitfl/ledger.sqlite`` in the user's data folder."""
    named = os.environ.get("SPLITFL_LEDGER")
    if named:
        return Path(named).expanduser()
    data = os.environ.get("XDG_DATA_HOME", "")
    folder = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return folder / "splitfl" / "ledger.sqlite"


class Ledger:
    """A ledger file, open. Several processes, and several threads of each, may use one file at once.

    Args:
        path: the file; None for `default_path`.
        timeout_s: longest wait for other processes, in seconds.
        create: make the file if it is missing.

    Raises:
        ResourceError: the file is locked beyond `timeout_s`, or cannot be made, read or written. Every method raises it
            too, and then nothing was charged.
        DataError: the file is missing (without `create`), damaged, no ledger, or of a newer schema.
        UsageError: it was opened before a fork; see `splitfl.privacy.ledger_store`.
    """

    def __init__(self, path: Path | None = None, timeout_s: float = 30.0, *, create: bool = True) -> None:
        self._store = Store(path or default_path(), timeout_s=timeout_s, create=create)

    @property
    def path(self) -> Path:
        """The file."""
        return self._store.path

    def close(self) -> None:
        """Close the file; later use is an error."""
        self._store.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- charge, send, confirm

    def charge(self, release: Release) -> bool:
        """Charge a release, before its bytes leave.

        Returns:
            True if it was charged now; False if the same release was charged before, so that its bytes, and no others,
            may be sent again: noise that is drawn anew makes it another release. Either way it is on the disk.

        Raises:
            BudgetError: it is beyond the budget of a unit. Nothing was charged.
            UsageError: another release has this id, or the budget is for another unit.
        """
        units = self._hashed(release)
        with self._store.write() as db:
            stored = db.execute(book.ENTRY, (release.release_id,)).fetchone()
            if stored is not None:
                book.check_same(stored, release, units)
                return False
            account = book.account_of(db, release.dataset, release.group, release.adversary, release.unit)
            totals = book.totals_of(db, account, units)
            book.check_budget(db, account, release, book.with_all(account, units, totals), times=1)
            book.enter(db, account, release, units, totals)
        return True

    def confirm(self, release_id: str) -> None:
        """Note that an answer came to a release. It may be lost with the power, and nothing depends on it.

        Raises:
            UsageError: no release has this id.
        """
        with self._store.write(durable=False) as db:
            row = db.execute("SELECT account, confirmed FROM entries WHERE release_id = ?", (release_id,)).fetchone()
            if row is None:
                raise UsageError("A release was confirmed that was never charged.", hint="charge it before it is sent")
            if row["confirmed"] is None:
                db.execute("UPDATE entries SET confirmed = ? WHERE release_id = ?", (time.time(), release_id))
                db.execute("UPDATE accounts SET confirmed = confirmed + 1 WHERE id = ?", (row["account"],))

    def check(self, release: Release, times: int = 1) -> float:
        """Whether a whole run would fit: `times` releases such as this one, for each of its units. Charges nothing.

        Returns:
            How many such releases there is room for now; infinity without a budget.

        Raises:
            BudgetError: there is no room for `times`; says for how many there is, and at which sigma they would fit.
            UsageError: the budget is for another unit.
        """
        units = self._hashed(release)
        with self._store.write(durable=False) as db:  # the account is made if it is missing
            account = book.account_of(db, release.dataset, release.group, release.adversary, release.unit)
            spent = book.with_all(account, units, book.totals_of(db, account, units))
            budget = book.check_budget(db, account, release, spent, times)
        return float("inf") if budget is None else min(budget.room(each, release.rho) for each in spent)

    # ---- budgets and data sets

    def set_budget(
        self,
        dataset: str,
        channel_group: str = "cut",
        *,
        unit: str,
        adversary: str,
        epsilon: float | None = None,
        delta: float | None = None,
        rho: float | Callable[[float, float], float] | None = None,
        releases: int | None = None,
    ) -> Budget:
        """Set the most that any one unit of a data set may spend; replaces the budget it has for this adversary.

        It may be lower than what is spent: everything is refused then.

        Args:
            dataset: fingerprint.
            channel_group: ``cut``, ``adapter`` or ``sketch``.
            unit: what the budget is for, one of `UNITS`; releases counted by another unit are refused from then on.
            adversary: who sees the releases, spelled as they spell it.
            epsilon: with `delta`, for all releases together.
            delta: above 0, below 1.
            rho: zCDP; with `epsilon` the rho that it allows, or a function that works it out (default: `rho_for`).
            releases: how often a unit may be released, bound or no bound.

        Raises:
            UsageError: a value out of range, none at all, or releases that were counted by another unit.
        """
        budget = make_budget(check_choice("unit", unit, UNITS), epsilon, delta, rho, releases)
        check_choice("group of channels", channel_group, tuple(GROUPS))
        adversary = check_adversary(adversary)
        with self._store.write() as db:
            account = book.account_of(db, check_dataset(dataset), channel_group, adversary, unit)
            others = "SELECT unit FROM accounts WHERE dataset = ? AND channels = ? AND adversary = ? AND unit != ? "
            other = db.execute(
                others + "AND releases > 0", (account["dataset"], channel_group, adversary, unit)
            ).fetchone()
            if other is not None:
                raise UsageError(
                    f"A budget for each {unit} would not see what {short_name(dataset, None)} has released: that was "
                    f"counted by {other['unit']}.",
                    hint=f"set the budget with --unit {other['unit']!r}",
                )
            columns = (budget.epsilon, budget.delta, budget.rho, budget.releases)
            db.execute(
                "INSERT OR REPLACE INTO budgets VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (account["dataset"], channel_group, adversary, unit, *columns),
            )
        return budget

    def note_dataset(self, dataset: str, label: str | None = None) -> None:
        """Make a data set known, with a name for people such as that of its file; a new name replaces the old one."""
        plain = None if label is None else " ".join(printable(label, 80).split()) or None
        with self._store.write(durable=False) as db:
            number = book.dataset_number(db, check_dataset(dataset))
            db.execute("UPDATE datasets SET label = coalesce(?, label) WHERE id = ?", (plain, number))

    def check_run(self, run: str, dataset: str) -> None:
        """Bind a run to the data set it trains on, at its start and again whenever it is resumed.

        Args:
            run: names one run for good, not only its folder: two runs of one name would be taken for one.
            dataset: fingerprint.

        Raises:
            UsageError: the run belongs to another data set; names both.
        """
        with self._store.write() as db:
            number = book.dataset_number(db, check_dataset(dataset))
            db.execute("INSERT OR IGNORE INTO runs VALUES (?, ?)", (check_text("run", run), number))
            bound = db.execute(
                "SELECT d.* FROM runs r JOIN datasets d ON d.id = r.dataset WHERE r.run = ?", (check_text("run", run),)
            ).fetchone()
            if bound["id"] != number:
                mine = db.execute("SELECT * FROM datasets WHERE id = ?", (number,)).fetchone()
                first, now = (short_name(row["fingerprint"], row["label"]) for row in (bound, mine))
                raise UsageError(
                    f"The run {printable(run)} has released rows of the data set {first}; it was now given {now}.",
                    expected="the rows that it began with",
                    hint="give it those rows, or begin another run with --out",
                )

    def find(self, prefix: str) -> str:
        """The fingerprint of the one data set that begins so.

        Raises:
            UsageError: no data set does, or several do.
        """
        with self._store.read() as db:
            known = [row["fingerprint"] for row in db.execute("SELECT fingerprint FROM datasets ORDER BY fingerprint")]
        found = [name for name in known if name.startswith(prefix)]
        if prefix in found:
            return prefix
        if len(found) != 1 or not prefix:
            shown = printable(prefix, 40)
            problem = f"{len(found)} data sets of the ledger begin with {shown!r}." if found else (
                f"No data set of the ledger {self.path} begins with {shown!r}.")  # fmt: skip
            hint = nearest(prefix, [name[:12] for name in found or known]) if known else "the ledger is empty"
            raise UsageError(problem, hint=hint)
        return found[0]

    # ---- what there is

    def spent(self, dataset: str) -> list[Account]:
        """The accounts of one data set: one for each adversary, group of channels and unit."""
        check_dataset(dataset)
        return [account for account in self.summary() if account.dataset == dataset]

    def summary(self) -> list[Account]:
        """Every account that has releases or a budget."""
        with self._store.read() as db:
            return report.accounts(db)

    def export(self, *, units: bool = False) -> dict[str, Any]:
        """Everything, as JSON can hold it.

        Args:
            units: with the keyed hashes of the units of each entry. They tell which entries share a unit.
        """
        with self._store.read() as db:
            return report.everything(db, units=units)

    def verify(self) -> None:
        """Work out every total again from the entries; takes time and memory in proportion to them.

        Raises:
            DataError: a total is not what the entries add up to.
        """
        with self._store.read() as db:
            wrong = report.mismatches(db)
        if wrong:
            raise DataError(
                f"The ledger {self.path} is damaged: its totals are not those of its entries ({'; '.join(wrong[:3])}).",
                hint="put a copy of it back",
            )

    def _hashed(self, release: Release) -> list[bytes] | None:
        """Keyed hashes of the units, sorted, 16 bytes each."""
        if release.units is None:
            return None
        start = hashlib.blake2b(release.dataset.encode() + b"\0", key=self._store.key, digest_size=_HASH_BYTES)
        digests = []
        for unit in release.units:
            each = start.copy()
            each.update(str(unit).encode("utf-8", "surrogatepass"))
            digests.append(each.digest())
        return sorted(digests)
