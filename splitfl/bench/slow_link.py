"""A slow link on one machine: a TCP relay that delays and limits what passes. ``python -m`` this, with its settings.

Network namespaces with netem would do the same in the kernel, but need rights that a benchmark should not ask for. Each
direction is a line of its own: bytes leave it one after the other at the rate, and arrive after half the round trip.
A chunk is read as soon as the line has room, so what waits for the line waits in the sender's socket, as it would.

What it is not: it drops nothing, and TCP's slow start on the real link is not imitated. `check` measures what it does.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from splitfl.bench.children import Child
from splitfl.bench.lines import own_output, say
from splitfl.bench.orders import Line
from splitfl.options.values import parse_address

_CHUNK = 1 << 16
_LEAST_LINE = 1 << 18  # bytes that are on the line at least before no more is read
_LATE_S = 0.005
_PING, _PINGS = 64, 15
_START_LIMIT_S = 60.0


class LinkStart(Line, frozen=True, kw_only=True):
    """What kind of link, and to where."""

    target: str
    """tcp://HOST:PORT"""
    rtt_ms: float
    mbit: float
    """Million bits a second, each way."""


class LinkReady(Line, frozen=True, kw_only=True):
    """Where to connect instead."""

    address: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a link does."""

    rtt_ms: float
    mbit: float


class _Line:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, start: LinkStart) -> None:
        self.source, self.sink = source, sink
        self.delay_s, self.bytes_a_second = start.rtt_ms / 2000, start.mbit * 1e6 / 8
        self.most = max(_LEAST_LINE, int(2 * self.delay_s * self.bytes_a_second))
        self.free_at, self.queued, self.ended = 0.0, 0, False

    def arrival(self, count: int, now: float) -> float:
        """When the last of `count` bytes comes out that go in now."""
        # A line that ended its last byte a moment ago would have gone on at once: this process was late, not the bytes.
        start = self.free_at if now - self.free_at < _LATE_S else now
        self.free_at = start + count / self.bytes_a_second
        return max(self.free_at, now) + self.delay_s


class SlowLink:
    """Relays connections to a target until `stop`; one thread's work."""

    def __init__(self, start: LinkStart) -> None:
        self.start, self.target = start, parse_address(start.target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.SelectSelector()  # epoll rounds a wait up to whole milliseconds
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._due: list[tuple[float, int, _Line, bytes]] = []
        self._numbers = itertools.count()
        self._open: list[socket.socket] = []
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._stopping.set()

    def run(self) -> None:
        """Relay until `stop` is called."""
        with self._listener, self._selector:
            while not self._stopping.is_set():
                for key, _ in self._selector.select(self._patience()):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                self._deliver()
        for each in self._open:
            each.close()

    def _patience(self) -> float:
        return min(max(self._due[0][0] - time.monotonic(), 0.0), 0.05) if self._due else 0.05

    def _accept(self) -> None:
        party, _ = self._listener.accept()
        try:
            owner = socket.create_connection(self.target, timeout=5)
        except OSError:  # nobody there at present
            party.close()
            return
        for source, sink in ((party, owner), (owner, party)):
            self._open.append(source)
            source.settimeout(None)
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(source, selectors.EVENT_READ, _Line(source, sink, self.start))

    def _read(self, line: _Line) -> None:
        part = b""
        with suppress(OSError):
            part = line.source.recv(_CHUNK)
        line.queued += len(part)
        line.ended = not part
        heapq.heappush(
            self._due, (line.arrival(len(part), time.monotonic()), next(self._numbers), line, part)
        )  # an end travels like a byte
        if line.ended or line.queued >= line.most:
            self._selector.unregister(line.source)

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, line, part = heapq.heappop(self._due)
            full = line.queued >= line.most
            line.queued -= len(part)
            try:
                if part:
                    line.sink.sendall(part)
                else:
                    line.sink.shutdown(socket.SHUT_WR)
            except OSError:
                line.ended = True
            if full and not line.ended and line.queued < line.most and line.source.fileno() >= 0:
                self._selector.register(line.source, selectors.EVENT_READ, line)


@contextmanager
def slow_link(start: LinkStart, log: Path) -> Iterator[str]:
    """A relay in a process of its own; gives the address to connect to."""
    words = ["splitfl.bench.slow_link", msgspec.json.encode(start).decode()]
    with Child("slow link", words, threads=1, log=log) as child:
        yield msgspec.json.decode(child.line(_START_LIMIT_S), type=LinkReady).address


def check(rtt_ms: float, mbit: float, log: Path, *, seconds: float = 1.0) -> Measured:
    """What a relay of these settings does: round trip of a few bytes, and rate of `seconds` of sending one way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        echo = threading.Thread(target=_echo, args=(server,), name="echo", daemon=True)
        echo.start()
        target = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with slow_link(LinkStart(target=target, rtt_ms=rtt_ms, mbit=mbit), log) as address:
            with socket.create_connection(parse_address(address), timeout=60) as link:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                trips = sorted(_round_trip(link, _PING) for _ in range(_PINGS))
                count = int(seconds * mbit * 1e6 / 8)
                trip = trips[len(trips) // 4]  # what a busy machine adds now and then is not the link's
                took = _round_trip(link, count) - trip
            echo.join(60)
    return Measured(rtt_ms=1000 * trip, mbit=count * 8 / took / 1e6)


def _round_trip(link: socket.socket, count: int) -> float:
    """Seconds until the last of `count` bytes has come there, and a word that it has is back here."""
    message = count.to_bytes(8, "little") + bytes(count - 8)
    start = time.monotonic()
    link.sendall(message)
    assert link.recv(1) == b"!"  # noqa: S101
    return time.monotonic() - start


def _echo(server: socket.socket) -> None:
    """Answer one connection: a word for each message, once all of it is here."""
    link, _ = server.accept()
    room = bytearray(1 << 20)
    with link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := link.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(header, "little") - 8
            while left:
                left -= link.recv_into(room, min(left, len(room)))
            link.sendall(b"!")


def main() -> None:
    """Relay until standard input ends, which it also does when the measuring process is gone."""
    answers = own_output()
    link = SlowLink(msgspec.json.decode(sys.argv[1], type=LinkStart))
    say(answers, LinkReady(address=link.address))
    with suppress(OSError):  # a wire does not wait for a processor; without the right to say so, it may
        os.nice(-10)
    threading.Thread(target=_stop_at_end, args=(link,), name="reads", daemon=True).start()
    link.run()


def _stop_at_end(link: SlowLink) -> None:
    sys.stdin.read()
    link.stop()


if __name__ == "__main__":
    main()
