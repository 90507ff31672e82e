"""A TCP proxy between a party and an owner that breaks the link in the ways in which links break, as it is told.

It sees ciphertext alone, and can do to it only what a network can: hold it, slow it, cut it anywhere, refuse it. Any
changed, lost or repeated byte of a TCP stream makes CURVE end the connection; so faults of whole messages (drop,
duplicate, reorder) cannot be made here, and `splitfl.bench.message_faults` makes them where it holds the keys.

Faults last until their time is over. What is to happen next is told from any thread, at once or when so many bytes have
passed; the latter hits the same place of a conversation however fast the machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeAlias

from splitfl.errors import ResourceError
from splitfl.wire.reach import parse_address

Kind: TypeAlias = Literal["cut", "cut in a frame", "half open", "delay", "trickle", "refuse"]
KINDS: tuple[Kind, ...] = ("cut", "cut in a frame", "half open", "delay", "trickle", "refuse")

_CHUNK = 1 << 16
_TICK_S = 0.02
_START_S = 10.0
_ABORT = struct.pack("ii", 1, 0)  # linger of 0 s: the peer sees a reset, as after a machine has lost its power


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that happens to a link."""

    kind: Kind
    seconds: float = 0.0
    """How long it lasts; nothing for the two cuts."""
    amount: float = 0.0
    """Of a delay: seconds that each chunk waits. Of a trickle: bytes a second, each way."""

    def __str__(self) -> str:
        return self.kind + (f" for {self.seconds:.1f} s" if self.seconds else "")


@dataclass
class Passed:
    """What has gone through so far, all connections together."""

    up: int = 0
    """Bytes from parties to the owner."""
    down: int = 0
    connections: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Trigger:
    at: int
    act: Callable[[], None]


class Proxy:
    """Relays connections from a free port of this machine; used as a context.

    Args:
        owner: ``tcp://HOST:PORT``; it need not be there all the time.
    """

    def __init__(self, owner: str) -> None:
        self._owner = parse_address(owner)
        self.passed = Passed()
        self.address = ""
        """Where parties connect to instead."""
        self._port = 0
        self._fault: Fault | None = None
        self._until = 0.0
        self._tear = False
        self._triggers: list[_Trigger] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen()).result(_START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError):
            self._call(self._close()).result(_START_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_S)
        self._loop.close()

    # ---- what is told, from any thread

    def apply(self, fault: Fault) -> None:
        """Begin a fault now; an earlier one that still lasts ends."""
        self._call(self._begin(fault)).result(_START_S)

    def clear(self) -> None:
        """End whatever fault lasts."""
        self._fault, self._until = None, 0.0

    def after(self, up_bytes: int, act: Callable[[], None]) -> None:
        """Call `act`, on another thread, once so many bytes have passed upwards; what follows waits for it."""
        self._triggers.append(_Trigger(up_bytes, act))

    # ---- inside

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, work: object) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        try:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self._port, reuse_address=True)
        except OSError as error:
            raise ResourceError(f"Port {self._port} of the fault proxy cannot be used: {error.strerror}.") from error
        self._port = self._listener.sockets[0].getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self._port}"

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _begin(self, fault: Fault) -> None:
        self.passed.faults[fault.kind] = self.passed.faults.get(fault.kind, 0) + 1
        match fault.kind:
            case "cut":
                self._cut()
            case "cut in a frame":
                self._tear = True  # with the next chunk, of which half is passed on
            case _:
                self._fault, self._until = fault, time.monotonic() + fault.seconds
        if fault.kind == "refuse" and (self._reopening is None or self._reopening.done()):
            self._cut()
            if self._listener is not None:
                self._listener.close()
            self._reopening = asyncio.create_task(self._listen_again(fault.seconds))

    async def _listen_again(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._listen()

    def _cut(self) -> None:
        for writer in self._writers:
            link = writer.get_extra_info("socket")
            if link is not None:
                with contextlib.suppress(OSError):
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            writer.transport.abort()
        self._writers.clear()

    def _lasting(self, kind: Kind) -> Fault | None:
        fault = self._fault
        return fault if fault is not None and fault.kind == kind and time.monotonic() < self._until else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.passed.connections += 1
        self._writers.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection(self._owner.host, self._owner.port)
        except OSError:
            self.passed.refused += 1
            self._drop(writer)
            return
        self._writers.add(up_writer)
        ways = (self._pump(reader, up_writer, upwards=True), self._pump(up_reader, writer, upwards=False))
        try:
            await asyncio.wait([asyncio.create_task(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._drop(writer)
            self._drop(up_writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upwards: bool) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while chunk := await reader.read(_CHUNK):
                if upwards:
                    await self._pull(len(chunk))
                while self._lasting("half open"):
                    await asyncio.sleep(_TICK_S)
                if (slow := self._lasting("delay")) is not None:
                    await asyncio.sleep(slow.amount)
                if self._tear:
                    self._tear = False
                    writer.write(chunk[: len(chunk) // 2])
                    await writer.drain()
                    self._cut()
                    return
                await self._write(writer, chunk)
                if upwards:
                    self.passed.up += len(chunk)
                else:
                    self.passed.down += len(chunk)

    async def _write(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        while chunk and (thin := self._lasting("trickle")) is not None:
            part = max(1, round(thin.amount * _TICK_S))
            writer.write(chunk[:part])
            await writer.drain()
            chunk = chunk[part:]
            await asyncio.sleep(_TICK_S)
        writer.write(chunk)
        await writer.drain()

    async def _pull(self, size: int) -> None:
        """Let what has been waiting for this many bytes happen before they are passed on."""
        while ready := [each for each in self._triggers if each.at <= self.passed.up + size]:
            self._triggers.remove(ready[0])
            await asyncio.to_thread(ready[0].act)


def draw_fault(draw: random.Random, *, longest_s: float) -> Fault:
    """Any fault; one that lasts does so for up to `longest_s`."""
    kind = draw.choice(KINDS)
    if kind in ("cut", "cut in a frame"):
        return Fault(kind=kind)
    amounts = {"delay": draw.uniform(0.005, 0.1), "trickle": draw.uniform(2e3, 1e5)}
    return Fault(kind=kind, seconds=draw.uniform(0.2, longest_s), amount=amounts.get(kind, 0.0))
