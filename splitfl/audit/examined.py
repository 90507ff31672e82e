"""What an examination of something else than traffic gave: the adapter, the trunk, the noise, a lying owner.

An attack on traffic has one figure that it is ranked by (`splitfl.audit.results.Outcome`). These have several, each of
its own kind, beside what they are to be compared with; and one sentence that a person can take away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from splitfl.audit.intervals import Estimate
from splitfl.audit.results import Cost, read_kept, unreadable
from splitfl.metrics import Result

Unit: TypeAlias = Literal["share", "AUC", "bits", "nats", "epsilon", "mu", "tokens", "steps", "rows", "releases"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One figure."""

    name: str
    value: float
    unit: Unit
    low: float | None = None
    """95 % interval, where one can be drawn."""
    high: float | None = None
    reference: float | None = None
    """What it is to be compared with."""
    beside: str = ""
    """What the reference is."""

    @classmethod
    def of(
        cls, name: str, found: Estimate, unit: Unit = "share", reference: float | None = None, beside: str = ""
    ) -> Fact:
        """A figure with its interval."""
        return cls(
            name=name, value=found.value, unit=unit, low=found.low, high=found.high, reference=reference, beside=beside
        )

    @property
    def shown(self) -> str:
        """Value and interval, for people."""
        if self.unit == "share":
            interval = (
                "" if self.low is None or self.high is None else f" ({100 * self.low:.1f} to {100 * self.high:.1f})"
            )
            return f"{100 * self.value:.1f} %{interval}"
        digits = 0 if self.unit in ("tokens", "steps", "rows", "releases") else 3
        interval = (
            "" if self.low is None or self.high is None else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        )
        unit = "" if self.unit in ("AUC", "epsilon", "mu") else f" {self.unit}"
        return f"{self.value:,.{digits}f}{unit}{interval}"

    @property
    def compared(self) -> str:
        """The reference, for people."""
        if self.reference is None:
            return ""
        value = (
            f"{100 * self.reference:.1f} %"
            if self.unit == "share"
            else f"{self.reference:,.3f}".rstrip("0").rstrip(".")
        )
        return f"{self.beside}: {value}" if self.beside else value


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One examination."""

    name: str
    title: str
    source: str
    adversary: str
    """Whom it plays."""
    found: str
    """What came out, in one sentence."""
    alarming: bool
    """Whether the adversary got something, or a claim does not hold."""
    weak_point: str
    facts: tuple[Fact, ...]
    records: int
    """Rows, canaries or releases that it stands on."""
    cost: Cost


def find_examined(path: Path, key: str) -> Examined | None:
    """The examination in this file, if it was made under the same key.

    Raises:
        DataError: the file holds something else.
    """
    found = read_kept(path, key)
    if found is None or "facts" not in found:
        return None
    try:
        facts = tuple(Fact(**each) for each in found["facts"])
        return Examined(**{**found, "facts": facts, "cost": Cost(**found["cost"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error


def examined_results(examined: Sequence[Examined]) -> list[Result]:
    """Every figure for ``--json``."""
    results = []
    for each in examined:
        for fact in each.facts:
            results.append(
                Result(case=each.name, metric=fact.name, value=fact.value, unit=fact.unit, reference=fact.reference)
            )
            ends = (("low", fact.low), ("high", fact.high))
            results += [
                Result(case=each.name, metric=f"{fact.name}, {end}", value=value, unit=fact.unit)
                for end, value in ends
                if value is not None
            ]
        results.append(Result(case=each.name, metric="alarming", value=int(each.alarming), unit="yes or no"))
        results.append(Result(case=each.name, metric="records", value=each.records, unit="records"))
        results.append(Result(case=each.name, metric="time", value=each.cost.seconds, unit="s"))
    return results
