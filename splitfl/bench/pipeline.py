"""``splitfl bench pipeline``: the step in overlapping micro-batches, beside the plain split step and the monolith.

The three take turns step by step, on the same processes as `splitfl bench split`. Two references:

- with one thread a side, the *slower side's own work*: processor time of the party's process, or of the owner's, for
  one plain step, whichever is larger. No schedule of the same work can take less;
- with two threads a side, the two-thread monolith.

The last case is another way not to wait: `guarded-gradfree` trains on replies that it keeps, beside a bare loop.

Both sides' processor time holds what encryption and sockets take, since that is theirs as well.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from splitfl.bench.agreement import compare_losses
from splitfl.bench.cases import (
    BUSY,
    GRADFREE,
    OWN,
    PARTY_MEMORY,
    PIPELINED,
    STEP,
    STEP_MEMORY,
    WARM_UP,
    Case,
    plan_cases,
)
from splitfl.bench.children import Child
from splitfl.bench.figures import Elsewhere, Figures
from splitfl.bench.orders import Held, Peak, Ready, Step, Stepped
from splitfl.bench.pipeline_orders import Epochs, EpochsTimed, KeptStart
from splitfl.bench.sizes import size_named
from splitfl.bench.split import Sides, open_sides, prepare, prepare_keys
from splitfl.bench.table import print_table
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.metrics import Result, write_results

_MAIN = (STEP, PIPELINED, OWN, GRADFREE)
_BATCHES = 4  # of an epoch with kept replies


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One step of the monolith, and the same step of the split."""

    whole: Stepped
    cut: Stepped
    owner: float
    """Processor seconds of the owner during the split's step."""


def bench_pipeline(settings: BenchSettings) -> None:
    """Measure, print the table, and write the figures.

    Raises:
        Disagreement: the ways did not compute the same.
        ResourceError, UnreachableError: a side ended, or hangs.
    """
    cases = planned(settings)
    of_kept = [case for case in cases if case.threads == 1][:1]
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-pipeline-") as temporary,
        UtilityCourse(len(cases) + len(of_kept), "bench pipeline") as course,
    ):
        work = Path(temporary)
        prepare_keys(work / "keys")
        course.begin()
        try:
            for case in cases:
                files = prepare(case.size, case.dtype, (settings.cache or work).resolve(), work)
                with open_sides(case, files, work / "keys", work) as sides:
                    found = measure(case, sides, settings.micro_batches, settings.steps)
                results += found
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                course.done(case.name, in_words(found))
                if case in of_kept:
                    found = measure_kept(case, files.kit, work, settings.steps)
                    results += found
                    if settings.json is not None:
                        write_results(settings.json, "bench", settings, results)
                    course.done(found[0].case, in_words(found))
        finally:
            course.close()
            print_table(results)


def planned(settings: BenchSettings) -> list[Case]:
    """The training cases of the settings; with ``--quick`` one that is over in no time and says nothing."""
    if settings.quick:
        return [Case(work="train", size=size_named("tiny"), rows=4, length=32, threads=1, dtype=settings.dtype)]
    return [case for case in plan_cases(settings, os.cpu_count() or 1) if case.work == "train"]


def measure(case: Case, sides: Sides, counts: Sequence[int], steps: int) -> list[Result]:
    """The figures of a case.

    Args:
        case: what to measure.
        sides: its processes.
        counts: of micro-batches, each measured by itself.
        steps: repetitions that count.

    Raises:
        Disagreement: split and monolith did not compute the same.
    """
    grown = {count: _memory(case, sides, count) for count in (1, *counts)}
    elsewhere = Elsewhere(sides.cpu_seconds)
    turns = [{count: _pair(case, sides, count, turn) for count in (1, *counts)} for turn in range(WARM_UP + steps)]
    busy = elsewhere.cores()
    pairs = [pair for turn in turns for pair in turn.values()]  # as they were trained: both sides took every step
    difference = compare_losses([p.whole.loss for p in pairs], [p.cut.loss for p in pairs], case.dtype)
    counted = {count: [turn[count] for turn in turns[WARM_UP:]] for count in turns[0]}
    figures = Figures(case)
    figures.add_times(STEP, "ms", [(1000 * p.whole.seconds, 1000 * p.cut.seconds) for p in counted[1]])
    own = {
        "party": statistics.median(p.cut.cpu for p in counted[1]),
        "owner": statistics.median(p.owner for p in counted[1]),
    }
    for side, seconds in own.items():
        figures.add(f"own work of the {side}", 1000 * seconds, "ms")
    whole_held, party_held = (side.ask(Peak(), Held).peak_rss for side in (sides.monolith, sides.party))
    figures.add(PARTY_MEMORY, party_held, "bytes", whole_held)
    figures.add(STEP_MEMORY, grown[1], "bytes", case.step_memory())
    figures.add("loss difference, relative", difference, "")
    figures.add(BUSY, busy, "cores")
    results = figures.results
    for count in counts:
        results += _pipelined(case, count, counted[count], max(own.values()), busy)
        held = Result(case=results[-1].case, metric=STEP_MEMORY, value=grown[count], unit="bytes", reference=grown[1])
        results.append(held)
    return results


def _memory(case: Case, sides: Sides, count: int) -> int | None:
    """By how much a step raises the party's memory; the second of two, when the optimiser has its own. Not timed."""
    orders = [Step(rows=case.rows, length=case.length, parts=count, memory=True)] * 2
    for order in orders:
        sides.monolith.ask(order, Stepped)  # both sides take every step, or their losses could not be compared
    return [sides.party.ask(order, Stepped).grown for order in orders][-1]


def _pair(case: Case, sides: Sides, count: int, turn: int) -> Pair:
    """One step of each; which of the two goes first changes with the turn."""
    order = Step(rows=case.rows, length=case.length, parts=count)
    whole = sides.monolith.ask(order, Stepped) if turn % 2 else None
    before = sides.owner.cpu_seconds()
    cut = sides.party.ask(order, Stepped)
    owner = sides.owner.cpu_seconds() - before
    return Pair(whole=whole or sides.monolith.ask(order, Stepped), cut=cut, owner=owner)


def _pipelined(case: Case, count: int, pairs: Sequence[Pair], own: float, busy: float) -> list[Result]:
    """Figures of a number of micro-batches, as a case of their own."""
    figures = Figures(case, suffix=f" {count} parts")
    figures.add_times(PIPELINED, "ms", [(1000 * p.whole.seconds, 1000 * p.cut.seconds) for p in pairs])
    middle = statistics.median(p.cut.seconds for p in pairs)
    figures.add(OWN, 1000 * middle, "ms", 1000 * own)
    figures.add("own work of the party", 1000 * statistics.median(p.cut.cpu for p in pairs), "ms")
    figures.add("own work of the owner", 1000 * statistics.median(p.owner for p in pairs), "ms")
    figures.add(BUSY, busy, "cores")
    aimed = {PIPELINED} if case.threads > 1 else {OWN}
    return [r if r.metric in aimed else replace(r, reach=None) for r in figures.results]


def ready(side: Child) -> int:
    """Wait until a side has loaded; the number of parameters that it trains."""
    return side.ready(Ready).trainable


def measure_kept(case: Case, kit: Path, work: Path, steps: int) -> list[Result]:
    """Training with kept replies from its second epoch on, beside a bare loop over features in memory."""
    start = KeptStart(
        kit=str(kit),
        folder=str(work / "kept"),
        rows=case.rows,
        length=case.length,
        batches=_BATCHES,
        dtype=case.dtype,
        threads=case.threads,
    )
    words = ["party.gradfree_side", msgspec.json.encode(start).decode()]
    with Child("party", words, threads=case.threads, log=work / f"{case.stem}-kept.log") as side:
        ready(side)
        side.ask(Epochs(), EpochsTimed)
        elsewhere = Elsewhere(side.cpu_seconds)
        turns = [side.ask(Epochs(), EpochsTimed) for _ in range(steps)]
        busy = elsewhere.cores()
    figures = Figures(case, prefix=f"guarded-gradfree{case.name.removeprefix('train')}")
    tokens = case.rows * case.length * _BATCHES
    figures.add_times(GRADFREE, "tokens/s", [(tokens / t.local, tokens / t.kept) for t in turns])
    figures.add(BUSY, busy, "cores")
    return figures.results


def in_words(results: Sequence[Result]) -> str:
    """The main figures of a case, in one line."""
    return ", ".join(f"{r.metric} {r.ratio:.3f}" for r in results if r.metric in _MAIN and r.ratio)
