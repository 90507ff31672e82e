"""``splitfl bench soak``: two owners and three parties for an hour, with kills and cuts, and every result compared.

    party      owner     what befalls it
    guest      killed    its link is cut, held and slowed; its owner is killed (-9) and started again
    resident   steady    its link is cut, held and slowed
    restless   both      real `splitfl tune` runs, killed (-9) at a random step and resumed; by turns at both owners

Both owners are the same `splitfl serve`; one of them is never killed, so that its memory can be seen to stay. A party
first works undisturbed, and that is what all later losses, gradients, words and adapters are compared with, bit by bit.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from splitfl.bench.faults import Proxy, draw_fault
from splitfl.bench.served import Served, furnish
from splitfl.bench.soak_loops import Killed, Loop, Steady
from splitfl.bench.soak_orders import SoakStart
from splitfl.config import BenchSettings
from splitfl.errors import InternalError
from splitfl.metrics import Result, write_results
from splitfl.report import as_size

GROWTH_REACH = 1.05
EARLY_MINUTE, SETTLED_S = 10.0, 60.0
_FAULT_S, _KILL_S, _LONGEST_S = 40.0, 240.0, 15.0
_SAMPLE_S, _TELL_S, _POLL_S, _MEASURE_S, _END_S = 5.0, 60.0, 0.25, 600.0, 60.0
_PACE_S, _RUN_PACE_S = 0.8, 12.0
_SHOWN = 20


@dataclass
class Memory:
    """Resident bytes of one process over time."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since faults began, and bytes."""

    def around(self, second: float) -> float | None:
        """Median of the samples within `SETTLED_S` of a moment; None without any."""
        near = [held for at, held in self.samples if abs(at - second) <= SETTLED_S]
        return statistics.median(near) if near else None


@dataclass
class Soak:
    """All that runs."""

    owners: dict[str, Served]
    proxies: dict[str, Proxy]
    loops: dict[str, Loop]
    memory: dict[str, Memory] = field(default_factory=dict)
    began: float = 0.0
    owner_kills: int = 0

    def sample(self) -> None:
        """Note the memory of whatever stays."""
        at = time.monotonic() - self.began
        found = {f"owner, {name}": owner.resident() for name, owner in self.owners.items()}
        found |= {f"party, {name}": loop.resident() for name, loop in self.loops.items()}
        for name, held in found.items():
            if held is not None:
                self.memory.setdefault(name, Memory()).samples.append((at, held))


def bench_soak(settings: BenchSettings) -> None:
    """Run it, and write the figures.

    Raises:
        InternalError: a step was lost, or a result was another one than without faults.
        ResourceError, UnreachableError: a process could not be started.
    """
    draw = random.Random(settings.seeds[0] if settings.seeds else 0)  # noqa: S311  a schedule, no secret
    with tempfile.TemporaryDirectory(prefix="splitfl-soak-") as temporary, ExitStack() as stack:
        soak = _start(Path(temporary), stack, draw)
        stack.callback(_stop, soak)
        _measure(soak)
        try:
            _disturb(soak, settings.minutes * 60, draw)
        finally:
            results = figures(soak)
            if settings.json is not None:
                write_results(settings.json, "bench", settings, results)
        _stop(soak)
    for result in results:
        if not result.case.startswith("minute "):
            print(f"{result.case}: {result.metric} {_shown(result)}", flush=True)
    _judge(soak)


def _start(folder: Path, stack: ExitStack, draw: random.Random) -> Soak:
    home = furnish(folder, ("guest", "resident", "restless"))
    owners = {name: stack.enter_context(Served(home, f"owner-{name}")) for name in ("killed", "steady")}
    ways = {"guest": "killed", "resident": "steady", "restless-1": "killed", "restless-2": "steady"}
    proxies = {name: stack.enter_context(Proxy(owners[owner].address)) for name, owner in ways.items()}
    loops: dict[str, Loop] = {}
    for seed, name in enumerate(("guest", "resident"), start=1):
        start = SoakStart(
            kit=str(home.kit),
            owner=proxies[name].address,
            owner_key=str(home.keys / "owner.key"),
            key=str(home.keys / f"{name}.key_secret"),
            seed=seed,
        )
        loops[name] = Steady(name, _PACE_S, start, folder / f"{name}.log")
    addresses = proxies["restless-1"].address, proxies["restless-2"].address
    loops["restless"] = Killed("restless", _RUN_PACE_S, home, addresses, random.Random(draw.random()))  # noqa: S311
    return Soak(owners=owners, proxies=proxies, loops=loops)


def _measure(soak: Soak) -> None:
    """The first round of every party, undisturbed."""
    _say("measuring what is right, without faults")
    for loop in soak.loops.values():
        loop.start()
    for loop in soak.loops.values():
        if not loop.measured.wait(_MEASURE_S) or loop.score.lost:
            raise InternalError(f"The party {loop.name} did not get through its first round, without any fault.")


def _disturb(soak: Soak, seconds: float, draw: random.Random) -> None:
    soak.began = time.monotonic()
    due = {name: draw.expovariate(1 / _FAULT_S) for name in soak.proxies}
    kill_due, sample_due, tell_due = draw.uniform(0.5, 1.0) * _KILL_S, 0.0, _TELL_S
    restarts: list[threading.Thread] = []
    while (now := time.monotonic() - soak.began) < seconds and any(loop.is_alive() for loop in soak.loops.values()):
        for name, proxy in soak.proxies.items():
            if now >= due[name]:
                fault = draw_fault(draw, longest_s=_LONGEST_S)
                threading.Thread(target=proxy.apply, args=(fault,), daemon=True).start()
                due[name] = now + fault.seconds + draw.expovariate(1 / _FAULT_S)
        if now >= kill_due:
            restarts.append(threading.Thread(target=soak.owners["killed"].kill_and_restart, daemon=True))
            restarts[-1].start()
            soak.owner_kills += 1
            kill_due = now + 45.0 + draw.expovariate(1 / _KILL_S)
        if now >= sample_due:
            soak.sample()
            sample_due = now + _SAMPLE_S
        if now >= tell_due:
            _tell(soak, seconds - now)
            tell_due = now + _TELL_S
        time.sleep(_POLL_S)
    for restart in restarts:
        restart.join(_END_S)
    soak.sample()


def _stop(soak: Soak) -> None:
    for proxy in soak.proxies.values():
        proxy.clear()
    for loop in soak.loops.values():
        loop.stopping.set()
    for loop in soak.loops.values():
        if loop.is_alive():
            loop.join(_END_S)


def figures(soak: Soak) -> list[Result]:
    """What came of it."""
    scores = {name: loop.score for name, loop in soak.loops.items()}
    results = []
    for name, score in scores.items():
        what = "runs" if name == "restless" else "steps and generations"
        results += [
            Result(case=name, metric=f"{what} compared", value=score.compared, unit=""),
            Result(case=name, metric=f"wrong {what}", value=score.wrong, unit="", reach=0),
            Result(case=name, metric=f"lost {what}", value=score.lost, unit="", reach=0),
            Result(case=name, metric="longest of them", value=round(score.longest_s, 2), unit="s"),
            Result(case=name, metric="sessions opened anew", value=score.openings, unit=""),
        ]
    faults: dict[str, int] = {}
    for proxy in soak.proxies.values():
        for kind, count in proxy.passed.faults.items():
            faults[kind] = faults.get(kind, 0) + count
    results += [Result(case="faults", metric=kind, value=count, unit="") for kind, count in sorted(faults.items())]
    results.append(Result(case="faults", metric="owner killed", value=soak.owner_kills, unit=""))
    kills = sum(score.kills for score in scores.values())
    results.append(Result(case="faults", metric="party killed", value=kills, unit=""))
    for name, memory in soak.memory.items():
        results += _of_memory(name, memory)
    return results


def _of_memory(name: str, memory: Memory) -> list[Result]:
    end = memory.samples[-1][0]
    early, late = memory.around(min(EARLY_MINUTE * 60, end / 2)), memory.around(end)
    reach = None if name == "owner, killed" else GROWTH_REACH  # each life of that one begins anew
    found = [
        Result(
            case=name, metric="memory at the end, beside that after ten minutes", value=late, unit="bytes",
            reference=None if early is None else round(early), reach=reach,
        )
    ]  # fmt: skip
    for minute in range(int(end // 60) + 1):
        near = [held for at, held in memory.samples if minute * 60 <= at < minute * 60 + 60]
        if near:
            middle = round(statistics.median(near))
            found.append(Result(case=f"minute {minute}", metric=f"memory of the {name}", value=middle, unit="bytes"))
    return found


def _shown(result: Result) -> str:
    value = result.value
    text = as_size(round(value)) if result.unit == "bytes" and isinstance(value, int | float) else f"{value}"
    text += "" if result.unit == "bytes" else f" {result.unit}".rstrip()
    return text + ("" if result.ratio is None else f" (x {result.ratio:.3f}; reach {result.reach})")


def _tell(soak: Soak, left_s: float) -> None:
    parts = [f"{name} {loop.score.done} done, {loop.score.wrong} wrong" for name, loop in soak.loops.items()]
    faults = sum(sum(proxy.passed.faults.values()) for proxy in soak.proxies.values())
    _say(f"{'; '.join(parts)}; {faults} faults, {soak.owner_kills} owner kills; about {left_s / 60:.0f} min left")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _judge(soak: Soak) -> None:
    problems = [problem for loop in soak.loops.values() for problem in loop.score.problems]
    if problems:
        raise InternalError(
            f"{len(problems)} results were lost or wrong: {'; '.join(problems[:_SHOWN])}",
            hint="the same --seeds draw the same schedule; please report it",
        )
