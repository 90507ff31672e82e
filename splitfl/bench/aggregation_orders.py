"""What `splitfl bench aggregation` asks of its process (`splitfl.bench.aggregation_side`): a JSON line each."""

from __future__ import annotations

from typing import TypeAlias

from splitfl.bench.orders import Line


class OpenSums(Line, frozen=True, kw_only=True, tag="open"):
    """Make parties and updates."""

    parties: int
    values: int
    """Of one update; a multiple of 8."""
    encrypted: bool
    """Whether TenSEAL is there."""
    nvflare: bool
    """Whether NVFlare is measured with."""


class Turn(Line, frozen=True, kw_only=True, tag="turn"):
    """Every way of summing once."""


class StackFactors(Line, frozen=True, kw_only=True, tag="stack"):
    """The rule `fra` once, on random adapters."""

    parties: int
    modules: int
    width: int
    rank: int


SumOrder: TypeAlias = OpenSums | Turn | StackFactors


class SumReady(Line, frozen=True, kw_only=True):
    """The process has begun, or has made what it was asked to."""


class SumFigures(Line, frozen=True, kw_only=True):
    """What was measured. Times are milliseconds of the processor, in all threads, children included."""

    figures: dict[str, float]
