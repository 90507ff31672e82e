"""A TCP relay between party and owner, which records what passes and can hold it back at a chosen byte."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from splitfl.options import parse_address
from tests.live.child import PATIENCE_S

_CHUNK = 1 << 16


@dataclass(eq=False)
class _Pipe:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    upwards: bool


@dataclass
class Relay:
    """Where parties connect instead, and what has passed so far."""

    address: str
    up: bytearray = field(default_factory=bytearray)
    """From parties to the owner, all connections in the order of arrival."""
    down: bytearray = field(default_factory=bytearray)
    hold_at: int | None = None
    """Bytes upwards after which nothing more is passed on."""
    connections: int = 0
    _holding: threading.Event = field(default_factory=threading.Event)
    _released: bool = False

    def wait_until_holding(self) -> None:
        """Wait until `hold_at` is reached; from then on the party gets no answer."""
        assert self._holding.wait(PATIENCE_S), f"only {len(self.up)} bytes came"

    def release(self) -> None:
        """Let everything pass again."""
        self._released = True

    @property
    def _holds(self) -> bool:
        full = self.hold_at is not None and len(self.up) >= self.hold_at and not self._released
        if full:
            self._holding.set()
        return full


@contextmanager
def relay(owner_address: str, *, hold_at: int | None = None) -> Iterator[Relay]:
    """Relay connections to `owner_address` on a free port of this machine; everything is closed on the way out."""
    host, port = parse_address(owner_address)
    with socket.create_server(("127.0.0.1", 0)) as listener, selectors.DefaultSelector() as selector:
        here = Relay(f"tcp://127.0.0.1:{listener.getsockname()[1]}", hold_at=hold_at)
        stop = threading.Event()
        worker = threading.Thread(target=_work, args=(here, listener, selector, (host, port), stop), name="relay")
        worker.start()
        try:
            yield here
        finally:
            stop.set()
            worker.join(PATIENCE_S)


def _work(
    here: Relay, listener: socket.socket, selector: selectors.BaseSelector, owner: tuple[str, int],
    stop: threading.Event,
) -> None:  # fmt: skip
    selector.register(listener, selectors.EVENT_READ)
    open_sockets: set[socket.socket] = set()
    while not stop.is_set():
        for key, _ in selector.select(timeout=0.02):
            if key.fileobj is listener:
                _accept(here, listener, selector, owner, open_sockets)
            elif here._holds:
                stop.wait(0.01)  # what waits makes `select` return at once
            else:
                _pass_on(here, key.data, selector)
    for each in open_sockets:
        each.close()


def _accept(
    here: Relay, listener: socket.socket, selector: selectors.BaseSelector, owner: tuple[str, int],
    open_sockets: set[socket.socket],
) -> None:  # fmt: skip
    party, _ = listener.accept()
    upstream = socket.create_connection(owner, timeout=PATIENCE_S)
    open_sockets |= {party, upstream}
    here.connections += 1
    selector.register(party, selectors.EVENT_READ, _Pipe(party, upstream, upwards=True))
    selector.register(upstream, selectors.EVENT_READ, _Pipe(upstream, party, upwards=False))


def _pass_on(here: Relay, pipe: _Pipe, selector: selectors.BaseSelector) -> None:
    try:
        chunk = pipe.source.recv(_CHUNK)
        if chunk:
            (here.up if pipe.upwards else here.down).extend(chunk)
            pipe.sink.sendall(chunk)
            return
    except OSError:
        pass  # one side has gone; so does the other
    for each in (pipe.source, pipe.sink):
        if each.fileno() >= 0:
            selector.unregister(each)
            each.close()
