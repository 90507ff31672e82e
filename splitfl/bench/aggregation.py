"""``splitfl bench aggregation``: masked and encrypted sums beside the plain float32 sum and NVFlare's encrypted one.

One child process measures (`splitfl.bench.aggregation_side`), one thread, in turns; times are those of the processor,
so that other work on the machine moves them little. A second one runs the rule `fra` at the size of a 7B model.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from splitfl.bench import aggregation_goals as goals
from splitfl.bench.aggregation_goals import figure
from splitfl.bench.aggregation_orders import OpenSums, StackFactors, SumFigures, SumReady, Turn
from splitfl.bench.aggregation_table import print_table
from splitfl.bench.children import Child
from splitfl.bench.figures import Elsewhere
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.metrics import Result, write_results
from splitfl.report import as_duration

PARTIES, VALUES = 10, 1_000_000
QUICK_PARTIES, QUICK_VALUES, QUICK_STEPS = 4, 16_000, 2
LLAMA_7B = StackFactors(parties=10, modules=64, width=4096, rank=16)
"""Query and value projections of 32 layers: where PEFT puts adapters in Llama."""
QUICK_FACTORS = StackFactors(parties=4, modules=2, width=512, rank=4)
BUSY = "cores busy elsewhere"
_LIMIT_S = 1800.0


def bench_aggregation(settings: BenchSettings) -> None:
    """Measure, print the table, and write the figures.

    Raises:
        ResourceError, UnreachableError: the measuring process ended, or hangs.
    """
    parties, values = (QUICK_PARTIES, QUICK_VALUES) if settings.quick else (PARTIES, VALUES)
    steps = min(settings.steps, QUICK_STEPS) if settings.quick else settings.steps
    encrypted = there("tenseal", "zstandard")
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-aggregation-") as temporary,
        UtilityCourse(steps + 2, "bench aggregation") as course,
    ):
        for sentence in _missing(encrypted):
            course.say(sentence)
        try:
            turns, busy = _measure_sums(
                OpenSums(parties=parties, values=values, encrypted=encrypted, nvflare=there('nvflare', 'tenseal')),
                steps, course, Path(temporary),
            )  # fmt: skip
            results = results_of_sums(turns, parties, values, busy, full=not settings.quick)
            _keep(settings, results)
            results += _measure_factors(settings, course, Path(temporary))
            _keep(settings, results)
        finally:
            course.close()
            print_table(results)


def there(*libraries: str) -> bool:
    """Whether all of them can be imported here."""
    return all(importlib.util.find_spec(name) is not None for name in libraries)


def _missing(encrypted: bool) -> list[str]:
    said = []
    if not encrypted:
        said.append("bfv is left out: it needs TenSEAL (pip install 'splitfl[he]')")
    if not there("nvflare", "tenseal"):
        said.append("NVFlare is left out, and what is compared with it: pip install 'splitfl[nvflare]'")
    return said


def _keep(settings: BenchSettings, results: Sequence[Result]) -> None:
    if settings.json is not None:
        write_results(settings.json, "bench", settings, results)


def _child(work: Path) -> Child:
    return Child("measuring process", ["splitfl.bench.aggregation_side"], threads=1, log=work / "side.log")


def _measure_sums(
    order: OpenSums, steps: int, course: UtilityCourse, work: Path
) -> tuple[list[dict[str, float]], float]:
    """The figures of each turn, the first one left out, and how busy the machine was otherwise."""
    with _child(work) as child:
        child.ready(SumReady)
        child.ask(order, SumReady, _LIMIT_S)
        course.begin()
        turns: list[dict[str, float]] = []
        elsewhere = Elsewhere(lambda: _with_ended(child))
        for number in range(1 + steps):
            turns.append(child.ask(Turn(), SumFigures, _LIMIT_S).figures)
            course.done("warm-up" if number == 0 else f"turn {number}", _in_words(turns[-1]))
        return turns[1:], elsewhere.cores()


def _with_ended(child: Child) -> float:
    """Processor time of the measuring process and of the workers that it started and ended."""
    try:
        times = psutil.Process(child.process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _in_words(turn: dict[str, float]) -> str:
    return (
        f"plain sum {turn['plain.coordinator']:.1f} ms, mask {turn['mask.coordinator']:.1f} ms at the coordinator "
        f"and {turn['mask.party']:.1f} ms at a party"
    )


def _measure_factors(settings: BenchSettings, course: UtilityCourse, work: Path) -> list[Result]:
    order = QUICK_FACTORS if settings.quick else LLAMA_7B
    with _child(work) as child:
        child.ready(SumReady)
        found = child.ask(order, SumFigures, _LIMIT_S).figures
    course.done("fra", as_duration(found["fra.cpu"] / 1000))
    return results_of_factors(found, order, full=not settings.quick)


# ---- figures


def results_of_sums(
    turns: Sequence[dict[str, float]], parties: int, values: int, busy: float, *, full: bool
) -> list[Result]:
    """Medians over the turns; ratios are medians of the ratios within a turn.

    Args:
        full: whether this is the size that the aims are for.
    """
    sums = Sums(turns, parties, values, full=full)
    results = [
        *sums.of_plain(),
        *sums.of_way("mask", "mask"),
        *(sums.of_way("bfv public key", "bfv public") if sums.has("bfv public.up") else []),
        *(sums.of_way("bfv seeded", "bfv seeded") if sums.has("bfv seeded.up") else []),
        *(sums.of_nvflare() if sums.has("nvflare.up") else []),
    ]
    return [*results, figure(sums.case("machine"), BUSY, busy, "cores")]


class Sums:
    """Reads the figures of the turns; arguments as for `results_of_sums`."""

    def __init__(self, turns: Sequence[dict[str, float]], parties: int, values: int, *, full: bool) -> None:
        self._turns, self._parties, self._values, self._full = turns, parties, values, full

    def has(self, name: str) -> bool:
        """Whether it was measured."""
        return name in self._turns[0]

    def case(self, kind: str) -> str:
        """A case of this size."""
        return f"{kind}: {self._parties} parties, {self._values:,} values"

    def median(self, name: str) -> float:
        """Over the turns."""
        return statistics.median(turn[name] for turn in self._turns)

    def ratio(self, name: str, other: str) -> float:
        """Median of the ratios within a turn."""
        return statistics.median(turn[name] / turn[other] for turn in self._turns)

    def of_plain(self) -> list[Result]:
        """The float32 sum."""
        case = self.case("plain float32 sum")
        return [
            self._figure(case, goals.BYTES, 4.0, "B"),
            self._figure(case, goals.COORDINATOR, self.median("plain.coordinator"), "ms"),
        ]

    def of_way(self, kind: str, name: str) -> list[Result]:
        """A way of summing."""
        case, nvflare = self.case(kind), self.has("nvflare.up")
        plain, masked = self.median("plain.coordinator"), name == "mask"
        added = (
            self.median("mask.coordinator ratio") if masked else self.ratio(f"{name}.coordinator", "plain.coordinator")
        )
        results = [
            self._figure(case, goals.WRONG, max(turn[f"{name}.wrong"] for turn in self._turns), ""),
            self._figure(case, goals.BYTES, self.median(f"{name}.up") / self._values, "B", reference=4.0),
            self._figure(case, goals.PARTY, self.median(f"{name}.party"), "ms",
                         reference=self.median("nvflare.party") if nvflare else None),
            self._figure(case, goals.COORDINATOR, self.median(f"{name}.coordinator"), "ms", reference=plain,
                         ratio=added),
            self._figure(case, goals.OPENING, self.median(f"{name}.opening"), "ms"),
            self._figure(case, goals.TENSORS_BYTES, self.median(f"{name}.up") / self._values, "B",
                         reference=self.median(f"{name}.up") / self._values, ratio=self.median(f"{name}.up ratio")),
            self._figure(case, goals.TENSORS_TIME, self.median(f"{name}.many tensors"), "ms",
                         reference=self.median(f"{name}.one tensor"),
                         ratio=self.ratio(f"{name}.many tensors", f"{name}.one tensor")),
        ]  # fmt: skip
        if masked:
            results.append(self._figure(case, goals.SIGNED, self.median("mask.signed"), "ms", reference=plain))
        elif nvflare:
            results += self._beside_nvflare(case, name)
        return results

    def _beside_nvflare(self, case: str, name: str) -> list[Result]:
        return [
            self._figure(case, goals.BYTES_NVFLARE, self.median(f"{name}.up") / self._values, "B",
                         reference=self.median("nvflare.up") / self._values),
            self._figure(case, goals.COORDINATOR_NVFLARE, self.median(f"{name}.coordinator"), "ms",
                         reference=self.median("nvflare.coordinator"),
                         ratio=self.ratio(f"{name}.coordinator", "nvflare.coordinator")),
        ]  # fmt: skip

    def of_nvflare(self) -> list[Result]:
        """What is compared with."""
        case = self.case("NVFlare's classes")
        return [
            self._figure(case, goals.BYTES, self.median("nvflare.up") / self._values, "B", reference=4.0),
            self._figure(case, goals.PARTY, self.median("nvflare.party"), "ms"),
            self._figure(case, goals.COORDINATOR, self.median("nvflare.coordinator"), "ms",
                         reference=self.median("plain.coordinator"),
                         ratio=self.ratio("nvflare.coordinator", "plain.coordinator")),
            self._figure(case, goals.TENSORS_BYTES, self.median("nvflare.many tensors up") / self._values, "B",
                         reference=self.median("nvflare.up") / self._values),
            self._figure(case, goals.TENSORS_TIME, self.median("nvflare.many tensors"), "ms",
                         reference=self.median("nvflare.party")),
        ]  # fmt: skip

    def _figure(
        self, case: str, metric: str, value: float, unit: str, *, reference: float | None = None,
        ratio: float | None = None,
    ) -> Result:  # fmt: skip
        return figure(case, metric, value, unit, reference=reference, ratio=ratio, full=self._full)


def results_of_factors(found: dict[str, float], order: StackFactors, *, full: bool) -> list[Result]:
    """Of the rule `fra`; its reference is the product of every module, formed and not yet decomposed."""
    case = f"fra: {order.parties} parties, {order.modules} modules {order.width}x{order.width}, rank {order.rank}"
    return [
        figure(case, goals.SECONDS, found["fra.cpu"] / 1000, "s", reference=found["fra.dense"] / 1000, full=full),
        figure(case, goals.LARGEST, found["fra.largest"], "", reference=found["fra.product"], full=full),
        figure(case, goals.MEMORY, found["fra.memory"], "bytes", reference=found["fra.updates"], full=full),
    ]
