"""Figures of one case, and what the machine did besides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import psutil

from splitfl.bench.cases import Case, reach_of
from splitfl.metrics import Result


class Figures:
    """Collects the results of one case; the monolith's figure is the reference."""

    def __init__(self, case: Case, prefix: str = "", suffix: str = "") -> None:
        self.case, self.name = case, f"{prefix or case.name}{suffix}"
        self.results: list[Result] = []

    def add(
        self, metric: str, value: float | str | None, unit: str, reference: float | None = None,
        ratio: float | None = None, reach: bool = True,
    ) -> None:  # fmt: skip
        """One figure; `ratio` is worked out where it is not given; without `reach` nothing is aimed at."""
        aimed = reach_of(metric, self.case.size) if reach else None
        self.results.append(
            Result(
                case=self.name,
                metric=metric,
                value=value,
                unit=unit,
                reference=reference,
                ratio=ratio,
                reach=aimed,
            )
        )

    def add_times(self, metric: str, unit: str, pairs: Sequence[tuple[float, float]]) -> None:
        """Medians of the monolith's and the split's figures, and the median of their ratios, pair by pair.

        The two figures of a pair were taken one right after the other, so their ratio holds where the machine drifts.
        """
        ratios = [cut / whole for whole, cut in pairs]
        middle = statistics.median(cut for _, cut in pairs)
        self.add(metric, middle, unit, statistics.median(whole for whole, _ in pairs), statistics.median(ratios))
        low, high = quarters(ratios)
        self.add("middle half of the ratios", f"{low:.3f}-{high:.3f}", "ratio")


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of one value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class Elsewhere:
    """How busy the machine was with other things, from now until `cores` is asked.

    Args:
        ours: gives the processor time that the measured processes have used.
    """

    def __init__(self, ours: Callable[[], float]) -> None:
        self._ours = ours
        self._start = self._now()

    def cores(self) -> float:
        """Processors kept busy by others, on average."""
        wall, busy, ours = (after - before for before, after in zip(self._start, self._now(), strict=True))
        return max(0.0, busy - ours) / wall if wall else 0.0

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy = (
            times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))
        )
        own = psutil.Process().cpu_times()
        return time.monotonic(), busy, self._ours() + own.user + own.system


def loopback_bytes() -> int:
    """Bytes that have crossed the loopback interface so far, every header included; 0 where that cannot be read."""
    cards = psutil.net_io_counters(pernic=True)
    return next((cards[name].bytes_sent for name in ("lo", "lo0") if name in cards), 0)
