"""``splitfl bench rounds``: whole rounds between real processes, over loopback TCP with CURVE.

A coordinator (`splitfl federate`) and its parties (`party/rounds_side.py`), which train nothing. Time and bytes of a
round are the coordinator's own, as it writes them with ``--json``; the first round warms up. Where many parties are
simulated they are threads of one process; the coordinator is what is measured, and stays a process of its own.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import psutil

from splitfl.bench import aggregation_goals as goals
from splitfl.bench.aggregation import BUSY, there
from splitfl.bench.aggregation_goals import figure
from splitfl.bench.aggregation_table import print_table
from splitfl.bench.figures import Elsewhere
from splitfl.bench.rounds_run import Course, Federation, bare_seconds, run_federation
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.metrics import Result, write_results

VALUES, QUICK_VALUES, FEW_VALUES = 1_000_000, 20_000, 1_000
MANY, QUICK_MANY, MANY_ROUNDS = 50, 6, 4
_WORDS = 4  # bytes of a value


def bench_rounds(settings: BenchSettings) -> None:
    """Run the federations, print the table, and write the figures.

    Raises:
        InternalError: a mean was not what it must be.
        ResourceError, UnreachableError: a process ended, or hangs.
    """
    planned = plan(settings, encrypted=there("tenseal", "zstandard"))
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-rounds-") as temporary,
        UtilityCourse(len(planned), "bench rounds") as shown,
    ):
        shown.begin()
        elsewhere = Elsewhere(_of_ended)
        try:
            for number, federation in enumerate(planned):
                work = Path(temporary) / str(number)
                results += _measure(federation, work, full=not settings.quick)
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                shown.done(federation.case, f"{results_time(results):.2f} s a round")
            results.append(figure("machine: all rounds", BUSY, elsewhere.cores(), "cores"))
            if settings.json is not None:
                write_results(settings.json, "bench", settings, results)
        finally:
            shown.close()
            print_table(results)


def _of_ended() -> float:
    """Processor time of the processes that this one has started and ended."""
    times = psutil.Process().cpu_times()
    return float(getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))


def plan(settings: BenchSettings, *, encrypted: bool) -> list[Federation]:
    """What is run, one after the other.

    Args:
        encrypted: whether TenSEAL is there.
    """
    values = QUICK_VALUES if settings.quick else VALUES
    rounds = 1 + (min(settings.steps, 2) if settings.quick else settings.steps)
    many, many_rounds = (QUICK_MANY, 3) if settings.quick else (MANY, MANY_ROUNDS)
    return [
        Federation(sum="plain", parties=2, values=values, rounds=rounds),
        Federation(sum="mask", parties=3, values=values, rounds=rounds),
        *([Federation(sum="bfv", parties=3, values=values, rounds=rounds)] if encrypted else []),
        Federation(sum="mask", parties=many, values=values, rounds=many_rounds, together=True),
    ]


def _measure(federation: Federation, work: Path, *, full: bool) -> list[Result]:
    course = run_federation(federation, work)
    results = figures_of_rounds(federation, course, bare_seconds(federation), full=full)
    if federation.together:
        small = Federation(sum=federation.sum, parties=federation.parties, values=FEW_VALUES, rounds=2, together=True)
        results += figures_of_memory(federation, course, run_federation(small, work / "small"), full=full)
    return results


def figures_of_rounds(federation: Federation, course: Course, bare: float, *, full: bool) -> list[Result]:
    """Time and bytes; the first round is left out.

    Args:
        bare: seconds that bare sockets take for the updates and the means alone.
        full: whether this is the size that the aims are for.
    """
    least = 2 * _WORDS * federation.values * federation.parties
    case = federation.case
    return [
        figure(case, goals.ROUND_TIME, statistics.median(course.seconds[1:]), "s", reference=bare, full=full),
        figure(case, goals.ROUND_CPU, course.cpu, "s"),
        figure(case, goals.ROUND_BYTES, statistics.median(course.sizes[1:]), "bytes", reference=least, full=full),
        figure(case, "largest error of a mean", course.error, ""),
    ]


def figures_of_memory(federation: Federation, course: Course, small: Course, *, full: bool) -> list[Result]:
    """What updates of this size cost the coordinator beyond updates of next to no size, and what is left over."""
    bound = 2 * _WORDS * federation.values  # one update and the running sum
    case = federation.case
    return [
        figure(case, goals.HELD, course.peak - small.peak, "bytes", reference=bound, full=full),
        figure(case, goals.GROWTH, course.peak - course.early, "bytes", reference=bound, full=full),
        figure(case, goals.LEFT, course.left, "", full=full),
    ]


def results_time(results: list[Result]) -> float:
    """Seconds of a round of the federation that was measured last."""
    times = [r.value for r in results if r.metric == goals.ROUND_TIME and isinstance(r.value, int | float)]
    return float(times[-1])
