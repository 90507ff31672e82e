"""Figures with their intervals: a bootstrap over records, where every send of one row is one record.

Sends of the same row in several epochs say the same thing several times. A bootstrap over sends would call that
evidence; so whole records are drawn, with all their sends (cluster bootstrap; Field and Welsh, "Bootstrapping clustered
data", 2007). Legend: N items, R records, B draws.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.95
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One figure and its 95 % interval."""

    value: float
    low: float
    high: float
    records: int
    """Different rows (or updates) that it is over."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def draws(records: int, seed: int) -> Floats:
    """How often each record is drawn: [B, R], each line sums to R. The same seed gives the same draws."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(records, np.full(records, 1 / records), size=DRAWS).astype(np.float64)


def share(got: Sequence[float], of: Sequence[float], record: Sequence[Hashable], *, seed: int = 0) -> Estimate | None:
    """Sum of `got` over sum of `of`, item by item, with its interval; None where there is nothing to count.

    Where all records score the same and that is nothing or everything, a bootstrap has no width. Its place takes the
    exact bound for R equal trials (Clopper and Pearson 1934): ``1 - 0.025 ** (1 / R)``.

    Args:
        got: [N] what was got.
        of: [N] what there was.
        record: [N] which record an item belongs to.
        seed: of the draws.
    """
    got_R, of_R = _by_record(got, record), _by_record(of, record)
    counted = of_R > 0
    got_R, of_R = got_R[counted], of_R[counted]
    if not len(of_R):
        return None
    value = float(got_R.sum() / of_R.sum())
    drawn = draws(len(of_R), seed)
    low, high = _middle((drawn @ got_R) / (drawn @ of_R))
    edge = 1 - float(((1 - LEVEL) / 2) ** (1 / len(of_R)))
    if np.array_equal(got_R, of_R):
        low = 1 - edge
    if not got_R.any():
        high = edge
    return Estimate(value=value, low=low, high=high, records=len(of_R))


def difference(
    got: Sequence[float], other: Sequence[float], of: Sequence[float], record: Sequence[Hashable], *, seed: int = 0
) -> Estimate | None:
    """The share of `got` less that of `other`, drawn together, record by record; None where there is nothing to count.

    Args:
        got: [N] what was got.
        other: [N] what was got in another way from the same items.
        of: [N] what there was.
        record: [N] which record an item belongs to.
        seed: of the draws.
    """
    less_R = _by_record([a - b for a, b in zip(got, other, strict=True)], record)
    of_R = _by_record(of, record)
    counted = of_R > 0
    less_R, of_R = less_R[counted], of_R[counted]
    if not len(of_R):
        return None
    drawn = draws(len(of_R), seed)
    low, high = _middle((drawn @ less_R) / (drawn @ of_R))
    return Estimate(value=float(less_R.sum() / of_R.sum()), low=low, high=high, records=len(of_R))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How well a score tells members from others."""

    auc: Estimate
    """Chance that a member's score is above another's; ties count half."""
    tpr: dict[float, Estimate]
    """Share of the members found, by the share of the others that are taken for members."""


def curve(
    score: Sequence[float], member: Sequence[bool], record: Sequence[Hashable], *,
    at: Sequence[float] = (0.01, 0.001), seed: int = 0,
) -> Curve | None:  # fmt: skip
    """Area under the curve and true positives at low false positives; None unless both kinds are there.

    A false-positive rate below 1/N of the others cannot be told from 0; the share found there is that above all of
    them, which is what is reported.

    Args:
        score: [N] the higher, the surer.
        member: [N] the truth.
        record: [N] which record an item belongs to.
        at: false-positive rates.
        seed: of the draws.
    """
    order = np.argsort(np.asarray(score, dtype=np.float64), kind="stable")
    sorted_N, member_N = np.asarray(score, dtype=np.float64)[order], np.asarray(member, dtype=bool)[order]
    if member_N.all() or not member_N.any():
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(record))}
    place_N = np.array([numbers[name] for name in record])[order]
    drawn_BR = np.concatenate([np.ones((1, len(numbers))), draws(len(numbers), seed)])  # the first is what was seen
    weight_BN = drawn_BR[:, place_N]
    in_BN, out_BN = weight_BN * member_N, weight_BN * ~member_N
    usable = (in_BN.sum(1) > 0) & (out_BN.sum(1) > 0)
    in_BN, out_BN = in_BN[usable], out_BN[usable]
    tied = np.searchsorted(sorted_N, sorted_N, "left"), np.searchsorted(sorted_N, sorted_N, "right")
    below_BN = np.concatenate([np.zeros((len(out_BN), 1)), np.cumsum(out_BN, axis=1)], axis=1)
    others = out_BN.sum(1, keepdims=True)
    beaten = (below_BN[:, tied[0]] + below_BN[:, tied[1]]) / 2
    auc_B = (in_BN * beaten).sum(1) / (in_BN.sum(1) * others[:, 0])
    wrong_BN = 1 - below_BN[:, tied[0]] / others  # false positives when the bar is this item's own score
    tpr = {rate: (in_BN * (wrong_BN <= rate + 1e-12)).sum(1) / in_BN.sum(1) for rate in at}
    count = len(numbers)
    return Curve(auc=_estimate(auc_B, count), tpr={rate: _estimate(found, count) for rate, found in tpr.items()})


def _estimate(values: Floats, records: int) -> Estimate:
    low, high = _middle(values[1:]) if len(values) > 1 else (0.0, 1.0)
    return Estimate(value=float(values[0]), low=low, high=high, records=records)


def _middle(values: Floats) -> tuple[float, float]:
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(values, (outside, 1 - outside))
    return float(low), float(high)


def _by_record(amounts: Sequence[float], record: Sequence[Hashable]) -> Floats:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(record))}
    sums = np.zeros(len(numbers))
    for amount, name in zip(amounts, record, strict=True):
        sums[numbers[name]] += amount
    return sums
