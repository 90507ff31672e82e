"""`splitfl ledger show|budget|export`: what each data set has released so far, and what is left.

An epsilon is printed inside one sentence only, which also says delta, the unit, the neighbours, the adversary and the
number of releases. Everything without a formal bound is called empirical, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from splitfl.config_privacy import LedgerBudget, LedgerExport, LedgerShow
from splitfl.errors import UsageError, printable
from splitfl.files import replace_text
from splitfl.metrics import Result, write_results
from splitfl.privacy.ledger import Account, Budget, Ledger, default_path
from splitfl.privacy.ledger_records import GROUP_WORDS, NEIGHBOURS, short_name

DELTA = 1e-6
"""Delta of an epsilon that is shown for a data set whose budget names none."""


def show(settings: LedgerShow) -> None:
    """Print every account, or those of one data set."""
    path = settings.ledger or default_path()
    if settings.ledger is None and not path.exists():
        print(f"There is no ledger {path} yet: no release has been recorded.")
        accounts: Sequence[Account] = []
    else:
        with Ledger(path, create=False) as ledger:
            accounts = ledger.summary() if settings.dataset is None else ledger.spent(ledger.find(settings.dataset))
    shown = [Shown(account=account, epsilon=epsilon_of(account)) for account in accounts]
    if accounts:
        _print(path, shown)
    if settings.json is not None:
        write_results(settings.json, "ledger show", settings, [result for each in shown for result in _results(each)])


def budget(settings: LedgerBudget) -> None:
    """Set the budget of a data set, and print what is left of it."""
    with Ledger(settings.ledger) as ledger:
        dataset = _dataset(ledger, settings)
        before = ledger.spent(dataset)
        ledger.set_budget(
            dataset,
            settings.channels,
            unit=settings.unit,
            adversary=settings.adversary,
            epsilon=settings.epsilon,
            delta=settings.delta,
            releases=settings.releases,
        )
        mine = [each for each in ledger.spent(dataset) if each.budget is not None and each.group == settings.channels]
    (account,) = [each for each in mine if each.adversary == " ".join(settings.adversary.lower().split())]
    print(f"{account.name}: {account.budget.words if account.budget else ''}")
    print(f"counted: {GROUP_WORDS[account.group]}; adversary: {account.adversary}; left: {_left(account)}")
    others = sorted({each.adversary for each in before if each.releases and each.group == account.group})
    if others and account.adversary not in others:
        print(
            f"note: nothing was released to {account.adversary!r} so far, but to {', '.join(map(repr, others))}: "
            "a budget counts releases to the adversary that it names, and to no other"
        )


def export(settings: LedgerExport) -> None:
    """Write the whole ledger as JSON, to a file or to stdout."""
    with Ledger(settings.ledger or default_path(), create=False) as ledger:
        text = json.dumps(ledger.export(units=settings.units), indent=2, allow_nan=False) + "\n"
    if settings.json is None:
        print(text, end="")
    else:
        replace_text(settings.json, text)


# ---- one account, in words


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An account and the epsilon that can be claimed for it."""

    account: Account
    epsilon: float | None

    @property
    def delta(self) -> float:
        """The budget's, else `DELTA`."""
        return _delta(self.account)

    @property
    def claim(self) -> str:
        """What can be said, in one sentence that says all of it."""
        account, most = self.account, self.account.most
        if account.empirical is not None:
            return f"empirical: {account.empirical}; only attacks can show what they told"
        if not account.releases:
            return "nothing was released"
        size = f"epsilon {_up(self.epsilon)} at delta {self.delta:g}" if self.epsilon is not None else "zCDP"
        missing = "" if self.epsilon is not None else "; for an epsilon: pip install 'splitfl[privacy]'"
        number = f"the {_times(most.releases)} of the {account.unit} sent most"
        return (
            f"formal: {size} for each {account.unit}, neighbours: {NEIGHBOURS}, adversary: {account.adversary}, over "
            f"{number} (rho {most.rho:.4g}; {account.releases} in all){missing}"
        )


def epsilon_of(account: Account) -> float | None:
    """Epsilon of the unit that is worst off; None if nothing formal can be said, or only without `dp-accounting`."""
    if account.empirical is not None or not account.releases:
        return None
    from splitfl.privacy.calibration import zcdp_epsilon

    try:
        return zcdp_epsilon(account.most.rho, _delta(account))
    except UsageError as error:
        if isinstance(error.__cause__, ImportError):
            return None
        raise


def _delta(account: Account) -> float:
    return DELTA if account.budget is None or account.budget.delta is None else account.budget.delta


def _up(epsilon: float) -> str:
    """Two decimals, or three digits below 0.1; never less than `epsilon`."""
    digits = 2 if epsilon >= 0.1 or epsilon == 0 else 2 - math.floor(math.log10(epsilon))
    text = f"{epsilon:.{digits}f}"
    return text if float(text) >= epsilon else f"{epsilon + 10**-digits:.{digits}f}"


def _times(number: int) -> str:
    return f"{number} release" + ("" if number == 1 else "s")


def _left(account: Account) -> str:
    """What the unit that is worst off may still spend."""
    releases, rho = account.left
    parts = [] if releases is None else [_times(releases)]
    return " and ".join(parts + ([] if rho is None else [f"rho {rho:.4g}"])) or "no limit"


def _print(path: Path, shown: Sequence[Shown]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"ledger {path}"))
    for each in shown:
        console.print(Text(f"\n{each.account.name}", style="bold"))
        for name, value in _lines(each):
            console.print(Text(f"  {name:<9} {value}"))


def _lines(each: Shown) -> Iterator[tuple[str, str]]:
    account = each.account
    yield (
        "counted",
        f"{GROUP_WORDS[account.group]} ({account.group}), adversary: {account.adversary}, by {account.unit}",
    )
    silent = account.releases - account.confirmed
    answers = f"; {silent} without an answer, charged all the same" if silent else ""
    yield "releases", f"{account.releases}; most for one {account.unit}: {account.most.releases}{answers}"
    yield "claim", each.claim
    yield "budget", "none" if account.budget is None else f"{account.budget.words}, adversary: {account.adversary}"
    yield "left", _left(account)


def _results(each: Shown) -> list[Result]:
    """The figures of one account; its case names it in full."""
    account, (releases, rho) = each.account, each.account.left
    limit = account.budget or Budget(unit=account.unit)
    case = f"{account.dataset}, {account.group}, {account.adversary}, {account.unit}"

    def result(metric: str, value: float | str | None, unit: str, reach: float | None = None) -> Result:
        return Result(case=case, metric=metric, value=value, unit=unit, reach=reach)

    at = f"delta {each.delta:g}, {account.unit}, {NEIGHBOURS}, {account.adversary}, {_times(account.most.releases)}"
    return [
        result("label", account.label, ""),
        result("releases", account.releases, "releases"),
        result("releases, most for one unit", account.most.releases, "releases", limit.releases),
        result("releases without a formal bound", account.unbounded, "releases"),
        result("releases without an answer", account.releases - account.confirmed, "releases"),
        result("releases left", releases, "releases"),
        result("rho, most for one unit", None if account.empirical else account.most.rho, "zCDP", limit.rho),
        result("rho left", rho, "zCDP"),
        result("epsilon, most for one unit", each.epsilon, at, limit.epsilon),
        result("claim", each.claim, ""),
    ]


# ---- which data set


def _dataset(ledger: Ledger, settings: LedgerBudget) -> str:
    """The fingerprint of the data set that was named: a file of rows, or (the beginning of) a fingerprint."""
    named = Path(settings.dataset)
    if not named.exists():
        try:
            return ledger.find(settings.dataset)
        except UsageError as error:
            if _is_whole(settings.dataset):
                return settings.dataset  # its rows were not released yet
            raise UsageError(
                f"{printable(settings.dataset, 80)} is no file of rows here, and: {error.problem}",
                expected="a file of rows, or the fingerprint of a data set, or the beginning of one",
                hint=error.hint,
            ) from None
    from splitfl.data import fingerprint, load_rows

    rows = load_rows(named, columns=settings.column_map(), task=settings.task)
    dataset = fingerprint(rows)
    ledger.note_dataset(dataset, label=named.name)
    print(f"{len(rows):,} rows, read as {rows.form} for {settings.task}: data set {short_name(dataset, named.name)}")
    return dataset


def _is_whole(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
