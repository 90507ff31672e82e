"""A TCP road between party and owner that breaks off at chosen bytes, and works again for the next connection."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from splitfl.options import parse_address

Way: TypeAlias = Literal["up", "down"]

_CHUNK = 1 << 16
_PATIENCE_S = 60.0


class _Link:
    """One connection: the party's socket and the one to the owner."""

    def __init__(self, party: socket.socket, owner: socket.socket) -> None:
        self.ends: dict[Way, tuple[socket.socket, socket.socket]] = {"up": (party, owner), "down": (owner, party)}

    def close(self, selector: selectors.BaseSelector) -> None:
        for each in self.ends["up"]:
            if each.fileno() >= 0:
                selector.unregister(each)
                each.close()


class Cutter:
    """Where the party connects instead. `passed` counts the bytes of all connections, each way."""

    def __init__(self, target: str) -> None:
        self.target = parse_address(target)
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        self.cuts: list[tuple[Way, int]] = []
        """Where to break off: a way, and how many bytes have passed that way then. Each happens once."""
        self.swallow_down = False
        """Nothing from the owner gets through any more, though the link stays up."""
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop, self._cut_now = threading.Event(), threading.Event()
        self._links: set[_Link] = set()
        self._thread = threading.Thread(target=self._run, name="cutter")

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Break off what is connected, now; what comes after is not swallowed any more."""
        self._cut_now.set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop.is_set():
                if self._cut_now.is_set():
                    self.swallow_down = False
                    self._close_all(selector)
                    self._cut_now.clear()
                for key, _ in selector.select(timeout=0.01):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.fileobj.fileno() >= 0:  # type: ignore[union-attr]
                        self._pass_on(selector, *key.data)
            self._close_all(selector)
        self._listener.close()

    def _close_all(self, selector: selectors.BaseSelector) -> None:
        for link in self._links:
            link.close(selector)
        self._links.clear()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        party, _ = self._listener.accept()
        try:
            owner = socket.create_connection(self.target, timeout=_PATIENCE_S)
        except OSError:  # no owner there at present
            party.close()
            return
        link = _Link(party, owner)
        self._links.add(link)
        self.connections += 1
        selector.register(party, selectors.EVENT_READ, (link, "up"))
        selector.register(owner, selectors.EVENT_READ, (link, "down"))

    def _pass_on(self, selector: selectors.BaseSelector, link: _Link, way: Way) -> None:
        source, sink = link.ends[way]
        part, ends_here = b"", True
        with contextlib.suppress(OSError):
            part = source.recv(_CHUNK)
            ends_here = not part
            due = next((at for cut_way, at in self.cuts if cut_way == way and at <= self.passed[way] + len(part)), None)
            if part and due is not None:
                self.cuts.remove((way, due))
                part, ends_here = part[: max(due - self.passed[way], 0)], True
            if not (way == "down" and self.swallow_down):
                sink.sendall(part)
            self.passed[way] += len(part)
        if ends_here:
            link.close(selector)
            self._links.discard(link)


@contextmanager
def cutter(target: str) -> Iterator[Cutter]:
    """Relay to `target` while the block runs."""
    made = Cutter(target)
    made.start()
    try:
        yield made
    finally:
        made.stop()
