"""``splitfl bench serving``: many parties at one owner, over CURVE: what they get in all, and how evenly.

Parties are threads of at most `PROCESSES` processes, each with a key and a connection of its own. They send states
that were drawn beforehand (`splitfl.bench.serving_side`), so the owner is the bound, also of a single party. A number
of parties, and batching, are compared by turns, each turn of one right after one of the other.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from splitfl.bench.children import Child
from splitfl.bench.figures import Elsewhere
from splitfl.bench.run import earlier_results
from splitfl.bench.served import Home, Served, furnish
from splitfl.bench.serving_orders import Done, Go, Leave, Loaded, LoadStart, Open, Work
from splitfl.config import BenchSettings
from splitfl.errors import InternalError
from splitfl.metrics import Result, write_results
from splitfl.report import as_size

PROCESSES = 4
_LONGER, _MANY = 3.0, 16
_LEAD_S = 1.0  # until what counts begins: all loops are under way by then
TOTAL_REACH, SHARE_REACH, DECODE_REACH, NO_SLOWER_REACH = 0.9, 0.5, 2.0, 0.97


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two that are compared."""

    parties: int
    batching: Literal["off", "auto", "on"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A comparison of total rates: `ours` beside `reference`."""

    name: str
    work: Work
    rows: int
    length: int
    memory: Literal["keep", "recompute"]
    ours: Side
    reference: Side
    reach: float | None = None
    longer: float = 1.0
    """How much longer its turns are: for steps of seconds."""

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.rows * (self.length if self.work == "train" else 1)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What came of one turn."""

    rate: float
    """Tokens a second, of all parties."""
    per_processor: float
    """Tokens for each second of the owner's processor time: what other work on the machine changes least."""
    least: float
    """The smallest party's tokens, beside an equal share."""
    latencies: list[float]


def plan(settings: BenchSettings) -> list[Case]:
    """All cases, in their order."""
    cases = []
    for count in dict.fromkeys(settings.crowd):
        cases.append(
            Case(
                name=f"train, {count} parties",
                work="train", rows=2, length=32, memory="keep", reach=TOTAL_REACH,
                longer=_LONGER if count >= _MANY else 1.0,
                ours=Side(parties=count, batching="auto"), reference=Side(parties=1, batching="auto"),
            )
        )  # fmt: skip
    shared: list[tuple[str, Work, int, int, int, Literal["auto", "on"], float | None]] = [
        ("decode, 8 parties of one row", "decode", 1, 1, 8, "auto", DECODE_REACH),
        ("decode, one party of one row", "decode", 1, 1, 1, "auto", NO_SLOWER_REACH),
        ("train, 8 parties of 1x16, recomputed", "train", 1, 16, 8, "on", 1.0),
        ("train, 4 parties of 8x128, recomputed", "train", 8, 128, 4, "on", NO_SLOWER_REACH),
    ]
    for name, work, rows, length, parties, batching, reach in shared:
        ours, alone = Side(parties=parties, batching=batching), Side(parties=parties, batching="off")
        name = f"{name}: batching {batching}"
        cases.append(Case(name=name, work=work, rows=rows, length=length, memory="recompute", ours=ours,
                          reference=alone, reach=reach, longer=_LONGER if length > 100 else 1.0))  # fmt: skip
    return cases[:1] + cases[len(settings.crowd) : len(settings.crowd) + 1] if settings.quick else cases


class Ground:
    """The owners and the processes that play parties; a context.

    Args:
        folder: for their files.
        parties: how many there may be at one time.
    """

    def __init__(self, folder: Path, parties: int, stack: ExitStack) -> None:
        names = [f"party{number}" for number in range(parties)]
        home = furnish(folder, names)
        self.owners: dict[str, Served] = {}
        for batching in ("off", "auto", "on"):
            options = ["--batching", batching, "--max-sessions", str(parties + 8)]
            self.owners[batching] = stack.enter_context(Served(home, f"owner-{batching}", options))
        self.players = [stack.enter_context(self._start(home, names, number)) for number in range(PROCESSES)]
        for player in self.players:
            player.ready(Done)

    @staticmethod
    def _start(home: Home, names: list[str], number: int) -> Child:
        keys = tuple(str(home.keys / f"{name}.key_secret") for name in names[number::PROCESSES])
        start = LoadStart(kit=str(home.kit), owner_key=str(home.keys / "owner.key"), keys=keys)
        words = ["splitfl.bench.serving_side", msgspec.json.encode(start).decode()]
        return Child(f"parties {number}", words, threads=1, log=home.logs / f"parties-{number}.log")

    def cpu_seconds(self) -> float:
        """Processor time of all of them."""
        owners = sum(owner.cpu_seconds() for owner in self.owners.values())
        return owners + sum(player.cpu_seconds() for player in self.players)

    def turn(self, case: Case, side: Side, seconds: float) -> Turn:
        """Have `side` ask for so long.

        Raises:
            InternalError: a party did not get its answers.
        """
        shares = [len(range(number, side.parties, PROCESSES)) for number in range(PROCESSES)]
        used = [(child, share) for child, share in zip(self.players, shares, strict=True) if share]
        owner = self.owners[side.batching].address
        for child, share in used:
            order = Open(owner=owner, parties=share, work=case.work, rows=case.rows, length=case.length,
                         memory=case.memory)  # fmt: skip
            _check(child.ask(order, Done).problem)
        begin = time.monotonic() + _LEAD_S
        for child, _ in used:
            _tell(child, Go(begin=begin, end=begin + seconds))
        time.sleep(max(begin - time.monotonic(), 0.0))
        before = self.owners[side.batching].cpu_seconds()
        time.sleep(max(begin + seconds - time.monotonic(), 0.0))
        processor = self.owners[side.batching].cpu_seconds() - before
        found = [msgspec.json.decode(child.line(seconds + 600), type=Loaded) for child, _ in used]
        for child, _ in used:
            child.ask(Leave(), Done)
        for loaded in found:
            _check(loaded.problem)
        parties = list(itertools.chain.from_iterable(loaded.latencies for loaded in found))
        steps = [len(latencies) for latencies in parties]
        total = sum(steps)
        return Turn(
            # A party asks all the time: by what its steps took, not by how many happened to end in time.
            rate=sum(case.tokens * len(latencies) / sum(latencies) for latencies in parties if latencies),
            per_processor=total * case.tokens / processor if processor else 0.0,
            least=min(steps) * len(steps) / total if total else 0.0,
            latencies=sorted(itertools.chain.from_iterable(parties)),
        )


def bench_serving(settings: BenchSettings) -> None:
    """Run it, print the figures, and write them after each case.

    Raises:
        InternalError: a party did not get its answers.
        ResourceError, UnreachableError: a process ended, or hangs.
    """
    cases = plan(settings)
    results = earlier_results(settings, _is_whole) if settings.resume else []
    left = [case for case in cases if case.name not in {result.case for result in results}]
    with tempfile.TemporaryDirectory(prefix="splitfl-serving-") as temporary, ExitStack() as stack:
        most = max((max(case.ours.parties, case.reference.parties) for case in left), default=0)
        ground = Ground(Path(temporary), most, stack) if left else None
        for number, case in enumerate(left):
            assert ground is not None  # noqa: S101
            waits = [one.longer * settings.seconds + 2 * _LEAD_S for one in left[number:]]
            minutes = 2 * settings.turns * sum(waits) / 60
            print(f"[{number + 1}/{len(left)}] {case.name}; about {minutes:.0f} min left", file=sys.stderr, flush=True)
            results += measure(case, ground, settings)
            if settings.json is not None:
                write_results(settings.json, "bench", settings, results)
    for result in results:
        print(f"{result.case}: {result.metric} {_shown(result)}", flush=True)


def measure(case: Case, ground: Ground, settings: BenchSettings) -> list[Result]:
    """The figures of one case."""
    elsewhere = Elsewhere(ground.cpu_seconds)
    pairs: list[tuple[Turn, Turn]] = []
    seconds = case.longer * settings.seconds
    for number in range(settings.turns):
        if number % 2:
            reference = ground.turn(case, case.reference, seconds)
            pairs.append((ground.turn(case, case.ours, seconds), reference))
        else:
            ours = ground.turn(case, case.ours, seconds)
            pairs.append((ours, ground.turn(case, case.reference, seconds)))
    busy = elsewhere.cores()
    mine, theirs = [ours for ours, _ in pairs], [reference for _, reference in pairs]
    # The median of the ratios of neighbours, not the ratio of medians: a machine that slows down slows both.
    ratio = statistics.median(ours.rate / reference.rate for ours, reference in pairs)
    base = statistics.median(turn.rate for turn in theirs)
    owner = ground.owners[case.ours.batching]
    peak = owner.resident()

    def figure(metric: str, value: float | None, unit: str, **more: float | None) -> Result:
        return Result(case=case.name, metric=metric, value=value, unit=unit, **more)

    found = [
        figure("total rate", round(ratio * base, 1), "tokens/s", reference=round(base, 1), reach=case.reach),
        _per_processor(case, pairs),
        figure("step, median", _ms(mine, 0.5), "ms", reference=_ms(theirs, 0.5)),
        figure("step, 99th of 100", _ms(mine, 0.99), "ms", reference=_ms(theirs, 0.99)),
    ]
    if case.ours.parties > 1:
        least = statistics.median(turn.least for turn in mine)
        found.append(figure("smallest share, beside an equal one", round(least, 3), "", reach=SHARE_REACH))
    found.append(figure("memory of the owner", peak, "bytes"))
    found.append(figure("cores busy elsewhere", round(busy, 2), "cores"))
    return found


def _per_processor(case: Case, pairs: list[tuple[Turn, Turn]]) -> Result:
    ours, reference = (statistics.mean(pair[side].per_processor for pair in pairs) for side in (0, 1))
    return Result(case=case.name, metric="for each processor second of the owner", value=round(ours, 1), unit="tokens",
                  reference=round(reference, 1))  # fmt: skip


def _ms(turns: list[Turn], part: float) -> float | None:
    """Milliseconds within which this part of all steps ended."""
    latencies = sorted(itertools.chain.from_iterable(turn.latencies for turn in turns))
    return round(1000 * latencies[min(math.ceil(part * len(latencies)), len(latencies)) - 1], 1) if latencies else None


def _is_whole(group: Iterable[Result]) -> bool:
    """Whether the figures of a case are all there: the rate is, and all of a case are written together."""
    return any(result.metric == "total rate" for result in group)


def _tell(child: Child, order: Go) -> None:
    assert child.process.stdin is not None  # noqa: S101
    child.process.stdin.write(msgspec.json.encode(order) + b"\n")
    child.process.stdin.flush()


def _check(problem: str | None) -> None:
    if problem is not None:
        raise InternalError(f"A party did not get its answers: {problem}")


def _shown(result: Result) -> str:
    value = result.value
    text = as_size(round(value)) if result.unit == "bytes" and isinstance(value, int | float) else f"{value}"
    text += "" if result.unit == "bytes" else f" {result.unit}".rstrip()
    beside = "" if result.ratio is None else f" (x {result.ratio:.3f})"
    return text + beside + ("" if result.reach is None else f"; reach {result.reach:g}")
