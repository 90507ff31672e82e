"""Which designs no other design beats: at least as good in utility, privacy and cost, and better in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from splitfl.compare.result import MONEY

if TYPE_CHECKING:
    from splitfl.compare.summary import Row


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows of one data set that no other row dominates; all of them need the three coordinates."""
    places = [coordinates(row) for row in rows]
    return [row for row, place in zip(rows, places, strict=True) if not any(dominates(o, place) for o in places)]


def coordinates(row: Row) -> tuple[float, float, float]:
    """Share of the gain that is lost, advantage of the best attack, money: less is better in each."""
    assert row.kept is not None  # noqa: S101
    assert row.advantage is not None  # noqa: S101
    return 1.0 - row.kept.mean, row.advantage, row.figures[MONEY]


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other
