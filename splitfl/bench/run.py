"""``splitfl bench``: choose the benchmark, go through its cases, keep what is measured as soon as it is there."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType

from splitfl import __version__
from splitfl.bench.agreement import Disagreement
from splitfl.bench.cases import Case, plan_cases
from splitfl.bench.course import Course
from splitfl.bench.offsite_settings import BENCHMARKS
from splitfl.bench.split import measure, open_sides, prepare, prepare_keys
from splitfl.bench.table import by_case, has_speed, print_table
from splitfl.config import BenchSettings
from splitfl.errors import DataError, InternalError, UsageError, nearest, printable
from splitfl.metrics import Result, machine, write_results

_SAME_FIGURES = ("name", "steps", "new_tokens", "dtype")  # settings that a figure depends on, beside its case


def bench(settings: BenchSettings) -> None:
    """Run a benchmark and print its table.

    Raises:
        UsageError: no such benchmark, or settings that do not fit.
        InternalError: the two sides of a case did not compute the same; its speed was not printed.
    """
    if settings.name not in BENCHMARKS:
        raise UsageError(
            f"There is no benchmark {printable(settings.name, 40)!r}.", hint=nearest(settings.name, BENCHMARKS)
        )
    run: Callable[[BenchSettings], None] = bench_split
    if settings.name != "split":  # some need libraries that others do without: the measuring process stays light
        run = getattr(import_module(f"splitfl.bench.{settings.name}"), f"bench_{settings.name}")
    with stopped_by_sigterm():
        run(settings)


def bench_split(settings: BenchSettings) -> None:
    """Monolith against split, case by case; see `splitfl.bench.split`."""
    cases = plan_cases(settings, os.cpu_count() or 1)
    results = earlier_results(settings) if settings.resume else []
    measured = {result.case for result in results}
    left = [case for case in cases if case.name not in measured]
    with tempfile.TemporaryDirectory(prefix="splitfl-bench-") as temporary, Course(left, settings.steps) as course:
        work = Path(temporary)
        prepare_keys(work / "keys")
        try:
            for case in left:
                course.begin(case)
                found = _measure(case, settings, work, course)
                results += found
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                course.end(found)
        finally:
            course.close()
            print_table(results)
    _refuse_differing(results)


def _measure(case: Case, settings: BenchSettings, work: Path, course: Course) -> list[Result]:
    """The figures of a case; where the two sides did not compute the same, only the one that shows it."""
    cache = settings.cache.resolve() if settings.cache is not None else work
    files = prepare(case.size, case.dtype, cache, work)
    with open_sides(case, files, work / "keys", work) as sides:
        course.loaded()
        try:
            return measure(case, sides, settings.steps, work, course.advance)
        except Disagreement as found:
            return [Result(case=case.name, metric=found.metric, value=found.value, unit="", reference=found.bound)]


def _refuse_differing(results: list[Result]) -> None:
    differing = [f"{case} ({group[0].metric})" for case, group in by_case(results) if not has_speed(group)]
    if differing:
        raise InternalError(
            f"Split and monolith did not compute the same, so these have no speed: {'; '.join(differing)}.",
            hint="`splitfl kit` with --verify compares the two; if it finds nothing, please report it",
        )


def earlier_results(
    settings: BenchSettings, is_whole: Callable[[list[Result]], bool] = has_speed
) -> list[Result]:  # fmt: skip
    """The figures in the ``--json`` file of a run that was broken off; none if there is no such file.

    Args:
        settings: of the run that goes on.
        is_whole: whether the figures of a case are all there; a case that is not is measured again.

    Raises:
        UsageError: no file was named, or it is of other settings, another machine or another version.
        DataError: it is no file of figures.
    """
    if settings.json is None:
        raise UsageError("--resume needs the file with the figures so far.", hint="add --json FILE")
    if not settings.json.exists():
        return []
    try:
        record = json.loads(settings.json.read_text(encoding="utf-8"))
        results = [Result(**result) for result in record["results"]]
        before = (record["command"], record["version"], record["machine"], record["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{settings.json} is not a file of figures ({type(error).__name__}).") from error
    same_settings = all(before[3].get(name) == getattr(settings, name) for name in _SAME_FIGURES)
    if before[:3] != ("bench", __version__, machine()) or not same_settings:
        raise UsageError(
            f"The figures in {settings.json} are of other settings, another machine or another version.",
            hint="leave --resume out to measure everything anew, or name another --json file",
        )
    return [result for _, group in by_case(results) if is_whole(group) for result in group]


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM is like Ctrl-C: children are ended, what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be handled in the main thread
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
