"""A relay of whole messages between parties and an owner: it loses, repeats, delays and reorders them, and notes all.

CURVE forbids this on the wire: nobody between can tell where a message begins, and one that is lost, repeated or moved
ends the connection. So this relay ends the encryption itself. Parties pin *its* key as the owner's, and it speaks to
the owner with their keys, which a test has and a network has not. Both sides run unchanged, over real sockets. What it
brings about happens for real where a queue is full, where an owner is replaced in the middle of a conversation, and in
any implementation of docs/wire.md that is not ours.

Every message is noted as its sender handed it over, before anything is done to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeAlias

import msgspec

from splitfl.errors import InternalError, SplitflError
from splitfl.wire.channel import Envelope, OwnerSocket, PartySocket
from splitfl.wire.keys import AllowList, KeyPair

Way: TypeAlias = Literal["up", "down"]
Request: TypeAlias = tuple[int, str, int]
"""Session, kind and step."""

_START_S, _CONNECT_S = 10.0, 60.0
_BUSY_S, _IDLE_S = 0.002, 0.02


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How often something is done to a message; each is a chance from 0 to 1."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0
    """A message waits until the next one has passed it."""
    longest_s: float = 0.05
    """Of a delay, and of the wait for a next one."""


@dataclass(frozen=True)
class Seen:
    """One message, as its sender said it."""

    way: Way
    party: str
    """Public key of the party that says or hears it."""
    frames: tuple[bytes, ...]

    @property
    def header(self) -> dict[str, object]:
        """Its header as plain msgpack."""
        return dict(msgspec.msgpack.decode(self.frames[0], type=dict[str, object]))

    @property
    def request(self) -> Request | None:
        """What it asks; None for a message that asks nothing which could be asked again."""
        header = self.header
        kind, step = header.get("type"), header.get("step")
        if kind not in ("forward", "backward", "fetch") or not isinstance(step, int):
            return None
        return int(str(header["session"])), str(kind), step


@dataclass(eq=False)
class _Back:
    """The relay's own connection to the owner, for one connection of a party."""

    party: str
    route: bytes
    up: queue.SimpleQueue[list[bytes] | None] = field(default_factory=queue.SimpleQueue)
    held: dict[Way, Callable[[], None]] = field(default_factory=dict)


class Middle:
    """The relay; a context.

    Args:
        owner: address of the real owner.
        owner_public: its key.
        own: the pair whose public half parties take for the owner's.
        parties: pairs of the parties, by public key.
        allow: the list that these are on.
        rates: what is done to messages.
        seed: of the draw.
        max_message_bytes: as for the sockets.
    """

    def __init__(
        self, owner: str, *, owner_public: bytes, own: KeyPair, parties: Mapping[str, KeyPair], allow: AllowList,
        rates: Rates, seed: int, max_message_bytes: int = 1 << 26,
    ) -> None:  # fmt: skip
        self._owner, self._owner_public, self._own, self._parties = owner, owner_public, own, parties
        self._allow, self.rates, self._largest = allow, rates, max_message_bytes
        self._draw = random.Random(seed)  # noqa: S311  a schedule, no secret
        self.seen: list[Seen] = []
        self.done: Counter[str] = Counter()
        """What was done to messages so far."""
        self.problems: list[str] = []
        self.address = ""
        """Where parties connect to."""
        self._front: OwnerSocket | None = None
        self._backs: dict[bytes, _Back] = {}
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="message relay", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_START_S) or not self.address:
            raise InternalError(f"The message relay did not start: {'; '.join(self.problems) or 'no reason'}.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(_START_S)
        for back in self._backs.values():
            back.up.put(None)
        for thread in self._threads:
            thread.join(_START_S)

    def requests(self) -> dict[Request, list[tuple[bytes, ...]]]:
        """Every request of the parties, and the frames of each time that it was said."""
        found: dict[Request, list[tuple[bytes, ...]]] = {}
        for seen in self.seen:
            if seen.way == "up" and (request := seen.request) is not None:
                found.setdefault(request, []).append(seen.frames)
        return found

    # ---- towards the parties: one asyncio loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except SplitflError as error:
            self.problems.append(str(error))
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._front = OwnerSocket(
            "tcp://127.0.0.1:0", keys=self._own, allow=self._allow, max_message_bytes=self._largest
        )
        await self._front.start()
        self.address = self._front.address
        self._ready.set()
        try:
            while not self._stopping.is_set():
                envelope = await self._front.receive(timeout_s=0.1)
                if envelope is not None:
                    self._upwards(envelope)
        finally:
            await self._front.close()

    def _upwards(self, envelope: Envelope) -> None:
        back = self._backs.get(envelope.route)
        if back is None:
            back = self._backs[envelope.route] = _Back(envelope.sender, envelope.route)
            thread = threading.Thread(target=self._work, args=(back,), name="relay to the owner", daemon=True)
            self._threads.append(thread)
            thread.start()
        frames = [bytes(frame) for frame in envelope.frames]
        self.seen.append(Seen("up", back.party, tuple(frames)))
        self._fate(back, "up", lambda: back.up.put(frames))

    def _downwards(self, back: _Back, frames: list[bytes]) -> None:
        self.seen.append(Seen("down", back.party, tuple(frames)))
        front = self._front
        assert front is not None  # noqa: S101
        self._fate(back, "down", lambda: front.send(back.route, frames))

    def _fate(self, back: _Back, way: Way, pass_on: Callable[[], object]) -> None:
        """Do to one message what is drawn for it."""
        rates, draw = self.rates, self._draw.random()
        earlier = back.held.pop(way, None)
        for what in ("drop", "duplicate", "delay", "reorder"):
            draw -= getattr(rates, what)
            if draw < 0:
                self.done[what] += 1
                self._do(what, back, way, pass_on)
                break
        else:
            pass_on()
        if earlier is not None:
            earlier()

    def _do(self, what: str, back: _Back, way: Way, pass_on: Callable[[], object]) -> None:
        later = self._draw.uniform(0.0, self.rates.longest_s)
        match what:
            case "duplicate":
                pass_on()
                self._loop.call_later(later, pass_on)
            case "delay":
                self._loop.call_later(later, pass_on)
            case "reorder":
                waits = [pass_on]

                def once() -> None:
                    if waits:
                        waits.pop()()

                back.held[way] = once
                self._loop.call_later(self.rates.longest_s, once)

    # ---- towards the owner: one thread a connection

    def _work(self, back: _Back) -> None:
        socket = PartySocket(
            self._owner,
            keys=self._parties[back.party],
            owner_public=self._owner_public,
            max_message_bytes=self._largest,
        )
        try:
            socket.open(_CONNECT_S)
            self._relay(back, socket)
        except (SplitflError, RuntimeError) as error:  # RuntimeError: the loop has been closed meanwhile
            if not self._stopping.is_set():
                self.problems.append(str(error))
        finally:
            socket.close()

    def _relay(self, back: _Back, socket: PartySocket) -> None:
        patience = _BUSY_S
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Empty):
                while (frames := back.up.get_nowait()) is not None:
                    socket.send(frames, timeout_s=_CONNECT_S)
                    patience = _BUSY_S
            came = socket.receive(patience)
            if came is None:
                patience = min(2 * patience, _IDLE_S)
            else:
                patience = _BUSY_S
                self._loop.call_soon_threadsafe(self._downwards, back, [bytes(frame) for frame in came])


def altered(requests: Mapping[Request, Sequence[tuple[bytes, ...]]]) -> list[Request]:
    """Requests that were said again in other bytes than before."""
    return [request for request, said in requests.items() if any(frames != said[0] for frames in said)]
