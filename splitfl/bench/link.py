"""``splitfl bench link``: steps over slow links, plain in bfloat16 against micro-batches that overlap in int8.

The link is a relay (`splitfl.bench.slow_link`), which is measured first and must do what it was set to within 5 %. The
optimum is that of the parts, each measured in the same run:

    max(party's own work, owner's own work, bytes one way / rate)

No schedule can reach it: a step has two round trips in it, and its first and last micro-batch overlap with nothing.
Party and owner compute with one thread each; the model is S at 32x128, whose activations are large beside what it
computes, as those of a trunk on a fast machine are.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitfl.bench.cases import BESIDE_PLAIN, BUSY, OPTIMUM, SLOW_LINK_MS, WARM_UP, Case
from splitfl.bench.children import Child, Owner
from splitfl.bench.figures import Elsewhere, Figures
from splitfl.bench.orders import Step, Stepped
from splitfl.bench.pipeline import ready
from splitfl.bench.sizes import size_named
from splitfl.bench.slow_link import LinkStart, Measured, check, slow_link
from splitfl.bench.split import Files, open_owner, open_party, prepare, prepare_keys
from splitfl.bench.table import print_table
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.errors import ResourceError
from splitfl.metrics import Result, write_results

MODEL, ROWS, LENGTH = "S", 32, 128
QUICK_MODEL, QUICK_ROWS, QUICK_LENGTH = "tiny", 4, 32
TOLERANCE = 0.05  # of the relay's round trip and rate
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A link."""

    rtt_ms: float
    mbit: float

    @property
    def name(self) -> str:
        """How results call it."""
        return f"link {self.rtt_ms:g} ms {self.mbit:g} Mbit/s"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One step over a link."""

    step: Stepped
    owner: float
    """Processor seconds of the owner."""


def bench_link(settings: BenchSettings) -> None:
    """Measure, print the table, and write the figures.

    Raises:
        ResourceError: the relay does not do what it was set to; or a side ended.
        UnreachableError: a side hangs.
    """
    name, rows, length = (QUICK_MODEL, QUICK_ROWS, QUICK_LENGTH) if settings.quick else (MODEL, ROWS, LENGTH)
    case = Case(work="train", size=size_named(name), rows=rows, length=length, threads=1, dtype="bfloat16")
    links = [Setting(rtt_ms=rtt, mbit=mbit) for rtt in settings.rtt for mbit in settings.mbit]
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-link-") as temporary,
        UtilityCourse(len(links), "bench link") as course,
    ):
        work = Path(temporary)
        prepare_keys(work / "keys")
        files = prepare(case.size, case.dtype, (settings.cache or work).resolve(), work)
        course.begin()
        try:
            for link in links:
                found = _measure(case, link, files, work, settings.micro_batches, settings.steps)
                results += found
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                course.done(link.name, in_words(found))
        finally:
            course.close()
            print_table(results)


def checked(link: Setting, log: Path) -> Measured:
    """What the relay does, measured.

    Raises:
        ResourceError: it is off by more than the tolerance, every time; the machine is too busy to relay in time.
    """
    for _ in range(_TRIES):
        found = check(link.rtt_ms, link.mbit, log)
        off = max(abs(found.rtt_ms / link.rtt_ms - 1), abs(found.mbit / link.mbit - 1))
        if off <= TOLERANCE:
            return found
    raise ResourceError(
        f"The relay gave {found.rtt_ms:.1f} ms and {found.mbit:.0f} Mbit/s.",
        expected=f"{link.rtt_ms:g} ms and {link.mbit:g} Mbit/s within {TOLERANCE:.0%}",
        hint="measure on a machine that does nothing else",
    )


def _measure(case: Case, link: Setting, files: Files, work: Path, counts: Sequence[int], steps: int) -> list[Result]:
    found = checked(link, work / "relay.log")
    with _opened(case, link, files, work) as (owner, plain, coded):
        elsewhere = Elsewhere(lambda: sum(child.cpu_seconds() for child in (owner, plain, coded)))
        ways = [(plain, 1), *((coded, count) for count in counts)]
        turns = []
        for turn in range(WARM_UP + steps):
            order = ways if turn % 2 else ways[::-1]
            taken = {count: _step(case, owner, party, count) for party, count in order}
            turns.append(taken)
        busy = elsewhere.cores()
    figures = Figures(case, prefix=link.name)
    figures.add("round trip of the relay", found.rtt_ms, "ms", link.rtt_ms)
    figures.add("rate of the relay", found.mbit, "Mbit/s", link.mbit)
    counted = turns[WARM_UP:]
    tokens = case.rows * case.length
    for count in (1, *counts):
        _add(figures, count, [turn[count] for turn in counted], [turn[1] for turn in counted], link, tokens)
    figures.add(BUSY, busy, "cores")
    return figures.results


def _add(
    figures: Figures, count: int, taken: Sequence[Taken], plain: Sequence[Taken], link: Setting, tokens: int
) -> None:
    """Figures of one way to take a step."""
    what = "plain, bfloat16" if count == 1 else f"{count} parts, int8"
    seconds = statistics.median(t.step.seconds for t in taken)
    party, owner = statistics.median(t.step.cpu for t in taken), statistics.median(t.owner for t in taken)
    way = max(statistics.median(t.step.sent for t in taken), statistics.median(t.step.received for t in taken))
    on_link = way * 8 / (link.mbit * 1e6)
    figures.add(f"step time ({what})", 1000 * seconds, "ms")
    for side, took in (("party", party), ("owner", owner), ("link", on_link)):
        figures.add(f"own work of the {side} ({what})", 1000 * took, "ms")
    best = tokens / max(party, owner, on_link)
    reach = {OPTIMUM: True, BESIDE_PLAIN: link.rtt_ms >= SLOW_LINK_MS}
    if count == 1:
        figures.add(f"rate ({what})", tokens / seconds, "tokens/s", best, reach=False)
        return
    figures.add(OPTIMUM, tokens / seconds, "tokens/s", best, reach=reach[OPTIMUM])
    gains = [before.step.seconds / after.step.seconds for before, after in zip(plain, taken, strict=True)]
    before = tokens / statistics.median(t.step.seconds for t in plain)
    figures.add(BESIDE_PLAIN, tokens / seconds, "tokens/s", before, statistics.median(gains), reach=reach[BESIDE_PLAIN])


def _step(case: Case, owner: Owner, party: Child, count: int) -> Taken:
    before = owner.cpu_seconds()
    step = party.ask(Step(rows=case.rows, length=case.length, parts=count), Stepped)
    return Taken(step=step, owner=owner.cpu_seconds() - before)


@contextmanager
def _opened(case: Case, link: Setting, files: Files, work: Path) -> Iterator[tuple[Owner, Child, Child]]:
    """The owner, and two parties behind one link each: one sends bfloat16, the other int8."""
    with ExitStack() as stack:
        owner = stack.enter_context(open_owner(case, files, work / "keys", work))
        target = owner.address()
        parties = []
        for coding in ("raw", "int8"):
            start = LinkStart(target=target, rtt_ms=link.rtt_ms, mbit=link.mbit)
            address = stack.enter_context(slow_link(start, work / "relay.log"))
            party = stack.enter_context(open_party(case, files, work / "keys", work, address, coding))
            ready(party)
            parties.append(party)
        yield owner, parties[0], parties[1]


def in_words(results: Sequence[Result]) -> str:
    """The main figures of a link, in one line."""
    return ", ".join(f"{r.metric} {r.ratio:.3f}" for r in results if r.metric in (OPTIMUM, BESIDE_PLAIN) and r.ratio)
