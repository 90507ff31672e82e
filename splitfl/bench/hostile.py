"""``splitfl bench hostile``: one honest party's rate while others attack, beside its rate just before.

A real owner serves an honest party, which trains. Attackers are processes of their own with a low priority, as if
they were on another machine: what is measured is what the attack costs the owner, not what it costs the attacker. The
turns are: a window without, a window with, and the two are compared; so a machine that slows down slows both. Memory is
the owner's. What a refusal costs is measured in this process, for each kind of bad frame.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from splitfl.bench.bad_frames import BAD_FRAMES, LIMITS
from splitfl.bench.children import Child
from splitfl.bench.hostile_orders import Attacked, AttackStart, Name, TellMe
from splitfl.bench.served import Home, Served, furnish
from splitfl.bench.soak_orders import SoakReady, SoakStart, Trained, TrainOne
from splitfl.config import BenchSettings
from splitfl.metrics import Result, write_results
from splitfl.report import as_size
from splitfl.wire import frames as wire

ATTACKS: tuple[Name, ...] = (
    "connections", "storm", "greetings", "garbage", "lying headers", "hellos", "replayed", "slow reader",
    "adversarial floats",
)  # fmt: skip
RATE_REACH, REFUSAL_REACH_US, ALLOCATED_REACH = 0.8, 50.0, 4096
_WINDOW_S, _QUICK_S, _WARM_STEPS, _ROUNDS = 8.0, 3.0, 5, 3
_NICE = 10
_FILL_S, _REPEATS, _ANSWER_S = 8.0, 2000, 300.0


def bench_hostile(settings: BenchSettings) -> None:
    """Measure, print and write.

    Raises:
        ResourceError, UnreachableError: a process ended, or the honest party got no answer.
    """
    results = refusal_costs()
    window = _QUICK_S if settings.quick else _WINDOW_S
    connections = 500 if settings.quick else settings.connections
    _raise_limit(connections)
    with tempfile.TemporaryDirectory(prefix="splitfl-hostile-") as temporary:
        folder = Path(temporary)
        home = furnish(folder, ("honest", "foe"))
        with Served(home, "owner") as owner:
            start = SoakStart(
                kit=str(home.kit), owner=owner.address, owner_key=str(home.keys / "owner.key"),
                key=str(home.keys / "honest.key_secret"), seed=1,
            )  # fmt: skip
            words = ["splitfl.bench.soak_side", msgspec.json.encode(start).decode()]
            with Child("honest party", words, threads=1, log=folder / "honest.log") as honest:
                honest.ready(SoakReady)
                steps = _Steps(honest)
                steps.rate(window / 2)
                for attack in ATTACKS[:4] if settings.quick else ATTACKS:
                    found = _under(attack, home, owner, steps, window, connections)
                    results += found
                    for result in found:
                        print(_line(result), file=sys.stderr, flush=True)
                    if settings.json is not None:
                        write_results(settings.json, "bench", settings, results)
    for result in results:
        print(_line(result), flush=True)


class _Steps:
    """The honest party's training."""

    def __init__(self, child: Child) -> None:
        self._child, self._number = child, 0

    def rate(self, seconds: float) -> float:
        """Steps a second over at least so long."""
        began, done = time.monotonic(), 0
        while (spent := time.monotonic() - began) < seconds or done < _WARM_STEPS:
            self._child.ask(TrainOne(number=self._number % 40), Trained, _ANSWER_S)
            self._number, done = self._number + 1, done + 1
        return done / spent


def _under(
    attack: Name, home: Home, owner: Served, steps: _Steps, window: float, connections: int
) -> list[Result]:  # fmt: skip
    start = AttackStart(
        attack=attack, owner=owner.address, owner_key=str(home.keys / "owner.key"),
        key=str(home.keys / "foe.key_secret"), kit=str(home.kit), connections=connections,
    )  # fmt: skip
    ratios, held, sent, opened, owner_cores = [], [], 0, 0, []
    before_memory = owner.resident() or 0
    alone_rates = []
    for _ in range(_ROUNDS):
        alone = steps.rate(window)
        words = ["splitfl.bench.hostile_side", msgspec.json.encode(start).decode()]
        with Child(f"attacker ({attack})", words, threads=1, log=home.logs / "foe.log") as foe:
            foe.ready(Attacked)
            os.setpriority(os.PRIO_PROCESS, foe.process.pid, _NICE)
            _fill(attack, steps)
            cpu, began = owner.cpu_seconds(), time.monotonic()
            besieged = steps.rate(window)
            owner_cores.append((owner.cpu_seconds() - cpu) / (time.monotonic() - began))
            held.append(owner.resident() or 0)
            told = foe.ask(TellMe(), Attacked)
            sent, opened = sent + told.sent, max(opened, told.opened)
        alone_rates.append(alone)
        ratios.append(besieged / alone)
    alone_rate, ratio = statistics.median(alone_rates), statistics.median(ratios)
    grown = max(held) - before_memory
    found = [
        Result(case=attack, metric="rate of the honest party", value=round(alone_rate * ratio, 3), unit="steps/s",
               reference=round(alone_rate, 3), ratio=ratio, reach=RATE_REACH),
        Result(case=attack, metric="memory of the owner, most beyond that before", value=grown, unit="bytes"),
        Result(case=attack, metric="sent", value=sent, unit="messages or connections"),
        Result(case=attack, metric="processor of the owner", value=round(statistics.median(owner_cores), 2),
               unit="cores"),
    ]  # fmt: skip
    if attack == "connections":
        found.append(Result(case=attack, metric="connections at one time", value=opened, unit=""))
        if opened:
            found.append(Result(case=attack, metric="memory of a connection", value=grown // opened, unit="bytes"))
    return found


def _fill(attack: Name, steps: _Steps) -> None:
    """Let an attack come to its full size before the clock counts."""
    until = time.monotonic() + (_QUICK_S if attack != "connections" else _FILL_S)
    while time.monotonic() < until:
        steps.rate(0.5)


def refusal_costs() -> list[Result]:
    """What one refusal takes: microseconds, and most bytes allocated meanwhile, for each kind of bad frame."""
    results = []
    for name, frames in BAD_FRAMES.items():
        seconds = [_timed(lambda frames=frames: refuse(frames)) for _ in range(_REPEATS)]  # type: ignore[misc]
        middle = statistics.median(seconds) * 1e6
        results += [
            Result(case=f"refusal: {name}", metric="time", value=round(middle, 1), unit="us", reach=REFUSAL_REACH_US),
            Result(case=f"refusal: {name}", metric="allocated at most", value=allocated(frames), unit="bytes"),
        ]
    return results


def refuse(frames: list[bytes]) -> None:
    """Meet a bad message as the owner does.

    Raises:
        AssertionError: it was not refused.
    """
    try:
        message = wire.open_header(frames, sender="party")
        wire.check_frames(message, frames, LIMITS)
    except wire.Malformed:
        return
    raise AssertionError("a bad frame was taken")


def allocated(frames: list[bytes]) -> int:
    """Most bytes of Python's memory held at once while a message is refused."""
    with suppress(AssertionError):
        refuse(frames)  # what is made once, such as messages of errors, is made now
    tracemalloc.start()
    try:
        refuse(frames)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _raise_limit(connections: int) -> None:
    """Open files: the owner's and the attacker's limit are this process's."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + 1000
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def _line(result: Result) -> str:
    value = as_size(result.value) if result.unit == "bytes" and isinstance(result.value, int) else f"{result.value}"
    beside = "" if result.ratio is None else f", {result.ratio:.2f} of the rate alone"
    reach = "" if result.reach is None else f" (reach {result.reach:g})"
    return f"{result.case}: {result.metric} {value} {'' if result.unit == 'bytes' else result.unit}{beside}{reach}"
