"""Peers without a server: a ROUTER that answers in a thread of its own, and a DEALER for each peer that is asked.

Answering never waits for training and training never waits for answering: what is answered are finished bytes. Asking
has a limit for every wait, so two peers that ask each other at the same moment both get their answer, and a peer that
has vanished costs its limit and no more. Who speaks is the key that CURVE has proven.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import TypeAlias, TypeVar

from splitfl.errors import InternalError, PeerError, RefusedError, SplitflError, UnreachableError, WireError, printable
from splitfl.privacy.disclosure import Disclosure
from splitfl.wire import mesh_messages as say
from splitfl.wire.channel import Envelope, OwnerSocket, PartySocket
from splitfl.wire.codecs import Frame
from splitfl.wire.frames import Malformed, Violation
from splitfl.wire.keys import AllowList, KeyPair

Answer: TypeAlias = tuple[say.Reply, Frame | None]
Answering: TypeAlias = Callable[[str, say.Ask], Answer]
"""Name of the peer that asks, and what it asks, to the answer; called in the server's thread. Must not wait."""
T = TypeVar("T")

_TICK_S = 0.1
_LOOK_S, _GONE_S = 0.5, 3.0  # a link that is down for so long is given up, whatever time is left
_START_S = 20.0


class PeerList(AllowList):
    """The folder of peers' keys, less those that are denied and one's own.

    Args:
        folder: holds NAME.key for each peer.
        deny: names that are not admitted all the same.
        own: one's own public key, which may lie in the folder too.
    """

    def __init__(self, folder: Path, *, deny: Collection[str], own: bytes) -> None:
        self._deny, self._own = frozenset(deny), own
        super().__init__(folder)

    def allowed(self, public_key: bytes) -> str | None:
        """The name under which `public_key` is admitted at this moment, or None."""
        name = super().allowed(public_key)
        return None if name in self._deny or public_key == self._own else name


class MeshServer:
    """Answers peers until it is closed.

    Args:
        bind: as for an `OwnerSocket`.
        keys: one's own.
        peers: whom to answer.
        answer: makes the answers.
        disclosure: of the protocol; what it does not list is neither answered nor sent.
        max_message_bytes: largest frame that is accepted.
    """

    def __init__(
        self, bind: str, *, keys: KeyPair, peers: AllowList, answer: Answering, disclosure: Disclosure,
        max_message_bytes: int,
    ) -> None:  # fmt: skip
        self._peers, self._answer, self._disclosure = peers, answer, disclosure
        self._socket = OwnerSocket(bind, keys=keys, allow=peers, max_message_bytes=max_message_bytes)
        self._stop, self._ready = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fedmod server", daemon=True)

    @property
    def address(self) -> str:
        """Where peers connect to, once `start` has returned."""
        return self._socket.address

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent so far."""
        return self._socket.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes received so far."""
        return self._socket.bytes_received

    def start(self) -> None:
        """Bind, and answer from now on.

        Raises:
            ResourceError: the address cannot be served.
        """
        self._thread.start()
        if not self._ready.wait(_START_S):
            raise InternalError("The server for peers did not start.")
        if self._error is not None:
            self.close()
            raise self._error

    def close(self) -> None:
        """Stop answering. May be called twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_START_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        await self._socket.start()
        self._ready.set()
        try:
            while not self._stop.is_set():
                envelope = await self._socket.receive(_TICK_S)
                if envelope is not None:
                    self._serve_one(envelope)
        finally:
            await self._socket.close()

    def _serve_one(self, envelope: Envelope) -> None:
        reply, frame = self._reply(envelope)
        if not self._disclosure.allows(say.kind(reply), say.tensors_of(reply), "peer to peer"):
            reply, frame = say.Refused(number=reply.number, code="not_disclosed", problem="This is not given."), None
        self._socket.send(envelope.route, say.encode(reply, frame))  # a peer that has gone asks again when it is back

    def _reply(self, envelope: Envelope) -> Answer:
        number = 0
        try:
            ask = say.decode_ask(envelope.frames)
            number = ask.number
            name = self._peers.allowed(envelope.sender.encode("ascii"))
            if name is None:  # taken off the list since it connected
                return say.Refused(number=number, code="denied", problem="This key is not admitted (any more)."), None
            if not self._disclosure.allows(say.kind(ask), (), "peer to peer"):
                return say.Refused(number=number, code="not_disclosed", problem="Nobody may ask for this."), None
            return self._answer(name, ask)
        except Violation as error:
            return say.Refused(number=number, code="malformed", problem=printable(error.problem, 300)), None
        except Exception:  # a peer gets no more of an error of ours than that there was one
            return say.Refused(number=number, code="internal", problem="This server met an error of its own."), None


class PeerLink:
    """The way to one peer. Used by one thread at a time.

    Args:
        name: of the peer, for people.
        address: where it listens.
        public: its public key (Z85).
        keys: one's own.
        disclosure: what it does not list is not asked for, and not believed.
        values: numbers in the frame of each kind of answer (``sketch``, or a part of the adapter).
        max_message_bytes: largest frame that is accepted.
    """

    def __init__(
        self, name: str, address: str, *, public: bytes, keys: KeyPair, disclosure: Disclosure, values: dict[str, int],
        max_message_bytes: int,
    ) -> None:  # fmt: skip
        self.name = name
        self._disclosure, self._values = disclosure, values
        self._socket = PartySocket(address, keys=keys, owner_public=public, max_message_bytes=max_message_bytes)
        self._open = False
        self._number = secrets.randbits(40)
        self.greeted: int | None = None
        """Number of the link (`PartySocket.links`) over which this peer has welcomed us last."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent so far."""
        return self._socket.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes received so far."""
        return self._socket.bytes_received

    @property
    def is_greeted(self) -> bool:
        """Whether a hello was welcomed over the link as it is now."""
        return self._open and self._socket.connected and self.greeted == self._socket.links

    def greet(self, hello: say.Hello, timeout_s: float) -> say.Welcome:
        """Say hello.

        Raises:
            PeerError: as `ask`.
        """
        reply, _ = self.ask(hello, timeout_s)
        if not isinstance(reply, say.Welcome):
            raise WireError(f"{self.name} answers a hello with {say.kind(reply)!r}.")
        self.greeted = self._socket.links
        return reply

    def ask(self, ask: say.Ask, timeout_s: float) -> Answer:
        """Ask, and wait for the answer; its number is set here.

        Raises:
            UnreachableError: no answer came within `timeout_s`.
            RefusedError: the peer said no, or does not admit this key.
            WireError: what came is no answer.
            KeyFileError: another key is in use there.
        """
        if not self._disclosure.allows(say.kind(ask), (), "peer to peer"):
            raise InternalError(f"A {say.kind(ask)!r} message is not in the protocol's list.")
        deadline = monotonic() + timeout_s
        try:
            if not self._open:
                self._socket.open(timeout_s)
                self._open = True
            return self._exchange(ask, deadline)
        except SplitflError as error:
            error.problem = error.problem.replace("No owner", "Nobody")  # the socket knows no peers
            self._open, self.greeted = False, None  # the next question begins with a new link
            raise

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._open = False
        self._socket.close()

    def _exchange(self, ask: say.Ask, deadline: float) -> Answer:
        self._number += 1
        ask = say.numbered(ask, self._number)
        part = ask.part if isinstance(ask, say.Want) else "sketch"
        frames = say.encode(ask)
        links, seen = self._socket.links, monotonic()
        self._socket.send(frames, timeout_s=max(min(deadline - monotonic(), _GONE_S), 0.001))
        while (left := deadline - monotonic()) > 0:
            came = self._socket.receive(min(left, _LOOK_S))
            if self._socket.connected:
                seen = monotonic()
            if self._socket.links != links or monotonic() - seen > _GONE_S:
                raise UnreachableError(f"The link to {self.name} was lost.", hint="it is asked again in a later round")
            if came is None:
                continue
            reply = say.decode_reply(came, expected_values=self._values.get(part, 0))
            if reply.number != self._number:  # of a question that was given up
                continue
            return self._checked(reply, came)
        raise UnreachableError(f"{self.name} did not answer in time.", hint="it is asked again in a later round")

    def _checked(self, reply: say.Reply, frames: list[memoryview]) -> Answer:
        if isinstance(reply, say.Refused):
            problem = f"{self.name} refuses: {printable(reply.problem, 200)}"
            expected = None if reply.expected is None else printable(reply.expected, 200)
            raise RefusedError(problem, code=reply.code, expected=expected)
        if not self._disclosure.allows(say.kind(reply), say.tensors_of(reply), "peer to peer"):
            raise Malformed(f"{self.name} sends what the protocol does not list.", code="not_disclosed")
        return reply, frames[1] if len(frames) > 1 else None


class Askers:
    """Asks several peers at once, each in a thread; what a peer does wrong is a value, not an exception."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="fedmod ask")

    def each(self, links: Collection[PeerLink], ask: Callable[[PeerLink], T]) -> dict[str, T | SplitflError]:
        """`ask` of every link, by name of the peer."""

        def one(link: PeerLink) -> T | SplitflError:
            try:
                return ask(link)
            except (PeerError, SplitflError) as error:
                return error

        pending: dict[str, Future[T | SplitflError]] = {link.name: self._pool.submit(one, link) for link in links}
        return {name: future.result() for name, future in pending.items()}

    def close(self) -> None:
        """End the threads; those that ask are waited for, within their limits."""
        self._pool.shutdown(cancel_futures=True)
