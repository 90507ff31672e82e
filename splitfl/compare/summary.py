"""Rows of a comparison: a design on a data set, with means and ranges over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from splitfl.compare.cells import REFERENCE
from splitfl.compare.grid import Grid, Prices
from splitfl.compare.pareto import front
from splitfl.compare.result import (
    BEFORE,
    HANDED,
    MONEY,
    OWNER_S,
    PARTIES,
    PARTY_S,
    RECEIVED,
    SCORE,
    SENT,
    Attacked,
    Outcome,
)

KEPT_ENOUGH = 0.95
"""Share of full LoRA's gain that a design must keep to count as useful."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A design on a data set and cut."""

    data: str
    cut: str
    design: str
    protocol: str
    mechanism: str
    metric: str
    seeds: int
    score: Spread
    before: float
    """The untuned model's score."""
    reference: float | None
    """Full LoRA's, of the same seeds."""
    kept: Spread | None
    """Share of full LoRA's gain; None where that gained nothing or is not there."""
    lost: float | None
    """Points that full LoRA is better by."""
    advantage: float | None
    """Of the best attack on the holder's rows in any seed; None where none was run."""
    best: Attacked | None
    """That attack."""
    works: bool
    """Whether any attack does better than guessing, by its interval, in any seed."""
    attacks: int
    """Different attacks on the holder's rows."""
    extraction: Attacked | None
    """The best attack on the owner's trunk."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Means of all others."""
    sends: tuple[str, ...] = ()
    hands: str = ""
    summed: str = ""
    bound: str = ""
    not_attacked: str = ""
    pareto: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether this is full LoRA."""
        return self.protocol == REFERENCE

    @property
    def bytes(self) -> float:
        """All that a party sends and receives."""
        return sum(self.figures.get(name, 0.0) for name in (SENT, RECEIVED, HANDED))

    @property
    def closed(self) -> bool:
        """Keeps enough of the gain, and no attack that was run beat guessing."""
        return self.kept is not None and self.kept.mean >= KEPT_ENOUGH and self.attacks > 0 and not self.works

    def to_json(self) -> dict[str, Any]:
        """As docs/compare.json and the page's table have it."""
        return asdict(self)


def summarise(outcomes: Iterable[Outcome], grid: Grid) -> list[Row]:
    """One row a design, data set and cut, in the order of the outcomes; failed ones are left out."""
    done = [outcome for outcome in outcomes if not outcome.failed]
    references = {(o.data, o.seed): o for o in done if o.protocol == REFERENCE}
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in done:
        groups.setdefault((outcome.data, outcome.cut, outcome.design), []).append(outcome)
    rows = [_row(group, references, grid) for group in groups.values()]
    marked = {id(row) for data in grid.data for row in front([r for r in rows if r.data == data and _placed(r)])}
    return [_with(row, pareto=id(row) in marked) for row in rows]


def _placed(row: Row) -> bool:
    """Whether a row has all three coordinates; the reference is no design that one could choose."""
    return not row.is_reference and row.kept is not None and row.advantage is not None


def _with(row: Row, **changed: Any) -> Row:
    return Row(**{**{name: getattr(row, name) for name in Row.__dataclass_fields__}, **changed})


def _row(group: Sequence[Outcome], references: Mapping[tuple[str, int], Outcome], grid: Grid) -> Row:
    first, task = group[0], grid.data[group[0].data]
    sign = 1.0 if task.higher_is_better else -1.0
    kept, lost, before, other = [], [], [], []
    for outcome in group:
        reference = references.get((outcome.data, outcome.seed))
        if reference is None:
            continue
        base, best = reference.figures[BEFORE], reference.figures[SCORE]
        gained, mine = sign * (best - base), sign * (outcome.figures[SCORE] - base)
        before.append(base)
        other.append(best)
        lost.append(100 * sign * (best - outcome.figures[SCORE]))
        if gained > 0:
            kept.append(mine / gained)
    holder = [a for o in group for a in o.attacks if a.side == "holder"]
    owner = [a for o in group for a in o.attacks if a.side == "owner"]
    strongest = max(holder, key=lambda a: (a.works, a.advantage), default=None)
    return Row(
        data=first.data, cut=first.cut, design=first.design, protocol=first.protocol, mechanism=first.mechanism,
        metric=first.metric, seeds=len(group), score=_spread([o.figures[SCORE] for o in group]),
        before=statistics.fmean(before) if before else float("nan"),
        reference=statistics.fmean(other) if other else None,
        kept=_spread(kept) if kept else None, lost=statistics.fmean(lost) if lost else None,
        advantage=None if strongest is None else strongest.advantage, best=strongest,
        works=any(a.works for a in holder), attacks=len({(a.name, a.metric) for a in holder}),
        extraction=max(owner, key=lambda a: a.value, default=None), figures=_means(group, grid.prices),
        sends=tuple(first.sends), hands=first.hands, summed=first.summed, bound=first.bound,
        not_attacked=first.not_attacked,
    )  # fmt: skip


def _spread(values: Sequence[float]) -> Spread:
    return Spread(mean=statistics.fmean(values), low=min(values), high=max(values))


def _means(group: Sequence[Outcome], prices: Prices) -> dict[str, float]:
    names = [n for n in group[0].figures if n not in (SCORE, BEFORE) and all(n in o.figures for o in group)]
    means = {name: statistics.fmean(o.figures[name] for o in group) for name in names}
    return {**means, MONEY: statistics.fmean(money(o, prices) for o in group)}


def money(outcome: Outcome, prices: Prices) -> float:
    """Processor time of all parties and the owner, and what the parties sent and received, at the grid's prices."""
    hour = prices.cpu_hour if outcome.device == "cpu" else prices.gpu_hour
    figures = outcome.figures
    parties = figures.get(PARTIES, 1.0)
    seconds = parties * figures.get(PARTY_S, 0.0) + figures.get(OWNER_S, 0.0)
    size = parties * sum(figures.get(name, 0.0) for name in (SENT, RECEIVED, HANDED))
    return seconds / 3600 * hour + size / 1e9 * prices.gigabyte


def verdict(rows: Sequence[Row], grid: Grid) -> str:
    """Whether a design keeps the gain on a classification set while no attack beats guessing; said either way."""
    asked = [row for row in rows if grid.data[row.data].classes and not row.is_reference]
    attacked = [row for row in asked if row.attacks]
    found = [row for row in asked if row.closed]
    percent = f"{100 * KEPT_ENOUGH:.0f} %"
    if found:
        names = "; ".join(
            f"{row.design} on {row.data} (keeps {100 * row.kept.mean:.0f} %)" for row in found if row.kept
        )
        return (
            f"Keeps {percent} of full LoRA's gain on a classification set while the best of our attacks stays within "
            f"its interval of guessing: {names}. This is empirical: it holds against the attacks that were run, on as "
            "many rows as there were."
        )
    if not attacked:
        return "No design on a classification set has been attacked: nothing can be said of any."
    return (
        f"No design keeps {percent} of full LoRA's gain on a classification set while the best of our attacks stays "
        f"within its interval of guessing ({len(attacked)} designs and data sets were attacked)."
    )
