"""What `splitfl compare` asks of the process that attacks a released adapter (`party/compare_side.py`)."""

from __future__ import annotations

from splitfl.bench.orders import Line


class Membership(Line, frozen=True, kw_only=True):
    """Tell rows that an adapter was tuned on from others, with the whole model and the adapter in hand."""

    run: str
    """Run directory of one party."""
    model: str
    """Directory of the whole model."""
    members: str
    """File of all rows that the adapter was tuned on, by whichever party."""
    others: str
    """File of rows of the same source that it was not."""
    rows: int
    """At most so many of each."""


class Told(Line, frozen=True, kw_only=True):
    """Area under the curve of one score, with its interval."""

    score: str
    value: float
    low: float
    high: float


class MembershipTold(Line, frozen=True, kw_only=True):
    """What came of it."""

    scores: tuple[Told, ...]
    failed: str = ""
