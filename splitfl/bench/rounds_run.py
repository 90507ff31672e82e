"""One federation of `splitfl bench rounds`: its processes from start to end, and what they tell."""

from __future__ import annotations

import json
import signal
import socket
import statistics
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from splitfl.bench.children import START_LIMIT_S, Child
from splitfl.bench.rounds_orders import PartiesReady, PartiesStart, RoundsOver
from splitfl.errors import InternalError, ResourceError
from splitfl.wire.keys import AllowList, new_keys
from splitfl.wire.round_messages import SumName

_LIMIT_S, _END_S, _POLL_S, _PATIENCE_S = 3600.0, 60.0, 0.01, 30.0
_ERROR = 1e-5  # of a mean of values below 1; encrypted sums have the coarsest grid
_BARE_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What is run once."""

    sum: SumName
    parties: int
    values: int
    rounds: int
    together: bool = False
    """Whether all parties are threads of one process."""

    @property
    def case(self) -> str:
        """How figures call it."""
        how = "parties in one process" if self.together else "each party a process"
        return f"{self.sum}, {self.parties} parties: {self.values:,} values, {how}"


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one federation took."""

    seconds: tuple[float, ...]
    """Of each round."""
    sizes: tuple[int, ...]
    """Bytes of each round, both ways, as the coordinator's socket counts them."""
    error: float
    """Largest difference of a mean from what it must be."""
    left: int
    """Files and threads that the parties' processes still held when all was over."""
    peak: int
    """Bytes of the coordinator's resident memory, at most."""
    early: int
    """The same, up to the end of the second round."""
    cpu: float
    """Seconds of the processor that a round took, in all processes together; connecting and ending count with it."""


def run_federation(federation: Federation, work: Path) -> Course:
    """Start a coordinator and the parties, let them go through all rounds, and end them.

    Raises:
        InternalError: a mean was not what it must be, or a party was left out of a round.
        ResourceError, UnreachableError: a process ended, or hangs.
    """
    keys = _prepare_keys(federation, work)
    with ExitStack() as stack:
        words = _coordinator_words(federation, work)
        coordinator = stack.enter_context(
            Child("coordinator", words, threads=1, log=work / "coordinator.log", stop_with=signal.SIGTERM)
        )
        _, address, _ = coordinator.line(START_LIMIT_S).decode().split()
        watched = stack.enter_context(Watch(coordinator))
        groups = (
            [tuple(range(federation.parties))] if federation.together else [(n,) for n in range(federation.parties)]
        )
        sides = [stack.enter_context(_side(federation, work, address, keys, group)) for group in groups]
        for side in sides:
            side.ready(PartiesReady)
        before = sum(each.cpu_seconds() for each in (coordinator, *sides))
        for side in sides:
            _begin(side)
        done = [msgspec.json.decode(side.line(_LIMIT_S), type=RoundsOver) for side in sides]
        spent = watched.cpu + sum(side.cpu_seconds() for side in sides) - before
        _wait(coordinator)
    _check(federation, done)
    seconds, sizes = _rounds_of(work / "federation.json")
    return Course(
        seconds=seconds, sizes=sizes, error=max(each.error for each in done), left=max(each.left for each in done),
        peak=watched.peak, early=watched.early or watched.peak, cpu=spent / federation.rounds,
    )  # fmt: skip


class Watch:
    """Reads the coordinator's memory and processor time again and again: when it is gone they cannot be read."""

    def __init__(self, coordinator: Child) -> None:
        self._coordinator = coordinator
        self.peak, self.early, self.cpu = coordinator.peak_rss() or 0, 0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watches the coordinator")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_POLL_S):
            self.peak = max(self.peak, self._coordinator.peak_rss() or 0)
            self.cpu = max(self.cpu, self._coordinator.cpu_seconds())
            if not self.early and b"round 1 is kept" in self._coordinator.log.read_bytes():
                self.early = self.peak


def _prepare_keys(federation: Federation, work: Path) -> list[Path]:
    """Secret key files of the parties; the coordinator's pair and the allow-list beside them."""
    folder = work / "keys"
    new_keys("coordinator", folder)
    allow, secret = AllowList(folder / "parties"), []
    for number in range(federation.parties):
        public, private = new_keys(f"party{number:02d}", folder)
        allow.add(public)
        secret.append(private)
    return secret


def _coordinator_words(federation: Federation, work: Path) -> list[str]:
    options = {
        "key": work / "keys" / "coordinator.key_secret", "parties": work / "keys" / "parties", "state": work / "state",
        "bind": "tcp://127.0.0.1:0", "rounds": federation.rounds, "rule": "fedit", "sum": federation.sum,
        "min-parties": federation.parties, "stage-deadline": _LIMIT_S, "deadline": _LIMIT_S, "wait": _PATIENCE_S,
        "clip": 1.0, "max-weight": 1.0, "json": work / "federation.json",
    }  # fmt: skip
    return ["splitfl", "federate", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _side(federation: Federation, work: Path, address: str, keys: list[Path], places: tuple[int, ...]) -> Child:
    start = PartiesStart(
        address=address,
        coordinator_key=str(work / "keys" / "coordinator.key"),
        keys=tuple(str(keys[place]) for place in places),
        places=places,
        parties=federation.parties,
        peers=str(work / "keys" / "parties"),
        folder=str(work / "parties"),
        sum=federation.sum,
        values=federation.values,
    )
    words = ["party.rounds_side", msgspec.json.encode(start).decode()]
    return Child("parties' process", words, threads=1, log=work / f"parties{places[0]:02d}.log")


def _begin(side: Child) -> None:
    assert side.process.stdin is not None  # noqa: S101
    side.process.stdin.write(b"begin\n")
    side.process.stdin.flush()


def _wait(coordinator: Child) -> None:
    try:
        code = coordinator.process.wait(_END_S)
    except subprocess.TimeoutExpired:
        raise ResourceError(f"The coordinator was still there {_END_S:.0f} s after its last round.") from None
    if code:
        raise ResourceError(f"The coordinator ended with code {code}: {coordinator.last_words()}")


def _check(federation: Federation, done: list[RoundsOver]) -> None:
    rounds, error = min(each.rounds for each in done), max(each.error for each in done)
    if rounds != federation.rounds or not error <= _ERROR:
        raise InternalError(
            f"{federation.case}: {rounds} of {federation.rounds} rounds, a mean off by {error:.1e}: this has no speed.",
            expected=f"every party in every round, and means within {_ERROR:g}",
        )


def _rounds_of(path: Path) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Seconds and bytes of each round, from the coordinator's own figures."""
    found: dict[str, dict[str, float]] = {}
    for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
        if result["case"].startswith("round "):
            found.setdefault(result["case"], {})[result["metric"]] = result["value"]
    rounds = list(found.values())
    sizes = tuple(int(each["bytes received"] + each["bytes sent"]) for each in rounds)
    return tuple(each["time"] for each in rounds), sizes


# ---- what bare sockets take


def bare_seconds(federation: Federation) -> float:
    """Each party sends an update over loopback TCP, all at once, and gets as much back: no rounds, keys or sums."""
    return statistics.median(_bare(federation.parties, 4 * federation.values) for _ in range(_BARE_REPEATS))


def _bare(parties: int, size: int) -> float:
    with socket.create_server(("127.0.0.1", 0), backlog=parties) as server, ExitStack() as stack:
        ends = []
        for _ in range(parties):
            mine = stack.enter_context(socket.create_connection(server.getsockname(), timeout=_END_S))
            theirs = stack.enter_context(server.accept()[0])
            ends.append((mine, theirs))
        began = time.perf_counter()
        threads = [threading.Thread(target=_echo, args=(theirs, size)) for _, theirs in ends]
        threads += [threading.Thread(target=_ask, args=(mine, size)) for mine, _ in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began


def _echo(end: socket.socket, size: int) -> None:
    end.sendall(_take(end, size))


def _ask(end: socket.socket, size: int) -> None:
    end.sendall(bytes(size))
    _take(end, size)


def _take(end: socket.socket, size: int) -> bytearray:
    held = bytearray(size)
    view = memoryview(held)
    while view:
        count = end.recv_into(view)
        if not count:
            raise OSError("the other end of a loopback connection was closed")
        view = view[count:]
    return held
