"""Step 7 of the journey: frames cross between two machines. The only file that imports zmq.

A party holds one `PartySocket` (DEALER, blocking), the owner one `OwnerSocket` (ROUTER, asyncio). Both run CURVE: the
party pins the owner's public key, the owner admits the public keys on its `AllowList`, asked once a connection. An
unencrypted channel exists only on loopback, and only when asked for by name.

Who sent a message is the public key that libzmq attaches to its frames, never the routing id: that one only says where
an answer goes. Ids are those that libzmq draws (five bytes, the first zero). What comes from an id that a peer chose
for itself is dropped, because whoever chooses an id could lie in wait for somebody else's answer.

Bounds. libzmq cuts the link of a peer that announces a frame above `max_message_bytes`. A queue holds `QUEUE` messages
a peer; a party that does not read loses its answers (`OwnerSocket.send` says False) and asks again. libzmq does not
bound the frames of one message: an *admitted* party can make the owner hold many of them until its connection ends.

Liveness. Heartbeats find a dead peer, and libzmq connects again by itself. A heartbeat waits behind a large frame on a
slow link, so the time allowed for it grows with `max_message_bytes`.

Large frames are sent without a copy. pyzmq runs one daemon thread a process for that, from the first such send on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from types import SimpleNamespace
from typing import Self, cast

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from splitfl.errors import InternalError, KeyFileError, ResourceError
from splitfl.wire import reach
from splitfl.wire.codecs import Frame, nbytes
from splitfl.wire.keys import AllowList, KeyPair

QUEUE = 16
INSECURE_SENDER = "insecure-loopback"
"""The one sender of an unencrypted channel, where nobody has a key."""
_ZAP_DOMAIN = "splitfl"
_CURVE_OVERHEAD = 64  # bytes that encryption adds to a frame: 33, rounded up
_LINGER_MS = 1000
_HANDSHAKE_MS = 10_000
_HEARTBEAT_MS = 5_000
_SLOWEST_BYTES_PER_MS = 1000  # 8 Mbit/s
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 5_000
_REVIVE_S = _LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """One message as the owner receives it."""

    sender: str
    """Public key (Z85) of the party that sent it; the identity of its sessions."""
    route: bytes
    """Where an answer goes; good for this connection only."""
    frames: list[memoryview]


def curve_keypair() -> KeyPair:
    """A new CURVE key pair from libzmq's generator."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public, secret=secret)


class PartySocket:
    """The party's end. Used by one thread at a time.

    Args:
        address: of the owner, ``tcp://HOST:PORT``.
        keys: the party's own pair; None only with `insecure_loopback`.
        owner_public: the owner's public key (Z85); None only with `insecure_loopback`.
        max_message_bytes: largest frame that is accepted from the owner.
        insecure_loopback: no encryption and no authentication; only for an address on this machine.

    Raises:
        UsageError: the address is no address, or it would have to be reached without encryption.
        KeyFileError: the two halves of `keys` do not belong together.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: KeyPair | None,
        owner_public: bytes | None,
        max_message_bytes: int,
        insecure_loopback: bool = False,
    ) -> None:
        self.address = reach.parse_address(address)
        reach.check_security(self.address, keys, owner_public, insecure_loopback)
        _check_pair(keys)
        self._keys, self._owner_public = keys, owner_public if keys is not None else None
        self._max_message_bytes = max_message_bytes
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._lost_at: float | None = None
        self._failures, self._links_told = 0, 0
        self.connected = False
        """Whether the link is up, as far as is known."""
        self.links = 0
        """How often the link has come up; more than before means that it was lost in between."""
        self.bytes_sent = 0
        self.bytes_received = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self, timeout_s: float) -> None:
        """Connect, and wait until both sides have proven their keys. May be called again.

        Raises:
            UnreachableError: no owner answered within `timeout_s`, or something else answers at that address.
            RefusedError: the owner does not admit this key (code ``revoked``).
            KeyFileError: an owner answers, but not the one whose key is in use.
        """
        self._drop()
        self._connect()
        deadline = monotonic() + timeout_s
        beaten = 0  # handshakes in a row that fail though an owner answers: a cut link tells nothing of keys
        try:
            while not self.connected:
                failures = self._failures
                if not self._wait(deadline, zmq.POLLIN):
                    raise reach.unreachable(self.address, reach.look(self.address, _LOOK_S), timeout_s)
                if self._failures > failures:
                    seen = reach.look(self.address, max(0.05, min(_LOOK_S, deadline - monotonic())))
                    beaten = beaten + 1 if seen.mechanism == "CURVE" else 0
                    reach.raise_if_hopeless(self.address, seen, self._owner_public, beaten)
            self._links_told = self.links
        except BaseException:
            self._drop()
            raise

    def send(self, frames: Sequence[Frame], *, timeout_s: float = 30.0) -> None:
        """Hand a message over to be sent; large frames are not copied, so their bytes must stay as they are.

        While the link is down this waits for it to come back.

        Raises:
            UnreachableError: the message could not be handed over within `timeout_s`.
            RefusedError: the owner does not admit this key any more (code ``revoked``).
        """
        link = self._opened()
        deadline = monotonic() + timeout_s
        self._read_news()
        while True:
            try:
                link.send_multipart(frames, flags=zmq.DONTWAIT, copy=False)
            except zmq.Again:
                if not self._wait(deadline, zmq.POLLOUT):
                    raise reach.unreachable(self.address, reach.look(self.address, _LOOK_S), timeout_s) from None
            else:
                self.bytes_sent += sum(map(nbytes, frames))
                return

    def receive(self, timeout_s: float) -> list[memoryview] | None:
        """The next message, without a copy, or None.

        None comes after `timeout_s`, and once at once when a lost link is up again: `links` is then higher, and what
        was asked before has to be asked again, after a hello.

        Raises:
            RefusedError: the link was lost, and the owner does not admit this key any more (code ``revoked``).
        """
        link = self._opened()
        deadline = monotonic() + timeout_s
        self._read_news()
        while True:
            try:
                frames = [frame.buffer for frame in link.recv_multipart(flags=zmq.DONTWAIT, copy=False)]
            except zmq.Again:
                if self.links > self._links_told or not self._wait(deadline, zmq.POLLIN):
                    self._links_told = self.links
                    return None
            else:
                self.bytes_received += sum(map(nbytes, frames))
                return frames

    def close(self) -> None:
        """Close; what is not sent within a second is lost. May be called twice."""
        self._drop(linger_ms=_LINGER_MS)
        self._context.term()

    def _connect(self) -> None:
        link = self._socket = self._context.socket(zmq.DEALER)
        _set_options(link, self.address, self._max_message_bytes)
        link.set(zmq.IMMEDIATE, 1)  # never queue for a link that is down: the owner would get stale requests first
        link.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        link.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        if self._keys is not None and self._owner_public is not None:
            link.curve_publickey, link.curve_secretkey = self._keys.public, self._keys.secret
            link.curve_serverkey = self._owner_public
        self._monitor = link.get_monitor_socket()
        self._failures, self._lost_at = 0, None
        link.connect(self.address.endpoint)

    def _drop(self, linger_ms: int = 0) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(linger_ms)
        self._socket = self._monitor = None
        self.connected = False

    def _opened(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            raise InternalError("A party's socket is used before `open`, or after `close`.")
        return self._socket

    def _wait(self, deadline: float, what: int) -> bool:
        """Wait until the socket is ready for `what` or the link has news; False when `deadline` has passed."""
        link, monitor = self._opened(), self._monitor
        left = deadline - monotonic()
        if left <= 0 or monitor is None:
            return False
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(link, what)
        step = min(left, _RECONNECT_MS / 1000) if self._lost_at is not None else left
        poller.poll(max(1, round(step * 1000)))
        self._read_news()
        return True

    def _read_news(self) -> None:
        """Take note of what happened to the link since the last look."""
        link, monitor = self._opened(), self._monitor
        while monitor is not None and monitor.poll(0):
            event = recv_monitor_message(monitor)
            self._note(zmq.Event(event["event"]), int(event["value"]))
        if self._lost_at is not None and monotonic() - self._lost_at > _REVIVE_S:
            # libzmq gives up, and says nothing, after an error in the peer's bytes; a second connect alone is ignored.
            self._lost_at = None
            link.disconnect(self.address.endpoint)
            link.connect(self.address.endpoint)

    def _note(self, event: zmq.Event, value: int) -> None:
        match event:
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                self.connected, self._failures, self._lost_at = True, 0, None
                self.links += 1
            case zmq.Event.HANDSHAKE_FAILED_AUTH if value == 400:
                raise reach.not_admitted(self.address, self._keys)
            case zmq.Event.DISCONNECTED:
                self._failures += not self.connected
                self.connected, self._lost_at = False, monotonic()
            case zmq.Event.CONNECT_RETRIED:
                self._lost_at = None


class OwnerSocket:
    """The owner's end. Lives in one asyncio loop.

    Args:
        bind: ``tcp://HOST:PORT``; port 0 takes a free one, ``*`` stands for every interface.
        keys: the owner's pair; None only with `insecure_loopback`.
        allow: the parties to admit; asked once for each new connection. None only with `insecure_loopback`.
        max_message_bytes: largest frame that is accepted from a party.
        insecure_loopback: as for a `PartySocket`, which also says what is raised.
        io_threads: libzmq's threads; each encrypts for its share of the connections.
    """

    def __init__(
        self,
        bind: str,
        *,
        keys: KeyPair | None,
        allow: AllowList | None,
        max_message_bytes: int,
        insecure_loopback: bool = False,
        io_threads: int = 2,
    ) -> None:
        self._bind = reach.parse_address(bind)
        reach.check_security(self._bind, keys, allow, insecure_loopback)
        _check_pair(keys)
        self._keys, self._allow = keys, allow
        self._max_message_bytes, self._io_threads = max_message_bytes, io_threads
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._authenticator: AsyncioAuthenticator | None = None
        self.address = ""
        """Where parties connect to, once `start` has returned."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self.dropped = 0
        """Messages that were not passed on, because their sender is not known or chose its own routing id."""

    async def start(self) -> None:
        """Bind, and admit parties from now on.

        Raises:
            ResourceError: the port is in use, or the address is not one of this machine.
        """
        self._context = zmq.asyncio.Context(io_threads=self._io_threads)
        link = self._socket = self._context.socket(zmq.ROUTER)
        _set_options(link, self._bind, self._max_message_bytes)
        link.set(zmq.ROUTER_MANDATORY, 1)  # a full or missing peer is an error to see, not a silent loss
        if self._keys is not None and self._allow is not None:
            self._start_authenticator(self._context, self._allow)
            link.curve_server = True
            link.curve_publickey, link.curve_secretkey = self._keys.public, self._keys.secret
            link.set(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
            link.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer from the authenticator nobody comes in
        try:
            link.bind(self._bind.endpoint)
        except zmq.ZMQError as error:
            await self.close()
            raise ResourceError(
                f"The address {self._bind} cannot be served: {str(error.strerror).lower()}.",
                hint="choose another port, or 0 for a free one; the host must be an address of this machine",
            ) from error
        self.address = link.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    async def receive(self, timeout_s: float = 1.0) -> Envelope | None:
        """The next message, without a copy; None when none came within `timeout_s`. Safe to cancel."""
        link = self._opened()
        deadline = monotonic() + timeout_s
        while await link.poll(timeout=max(0, round((deadline - monotonic()) * 1000))):
            route, *frames = await link.recv_multipart(flags=zmq.DONTWAIT, copy=False)
            if (sender := self._sender(route, frames)) is not None:
                self.bytes_received += sum(map(len, frames))
                return Envelope(sender=sender, route=route.bytes, frames=[frame.buffer for frame in frames])
            self.dropped += 1
            if monotonic() > deadline:
                break
        return None

    def send(self, route: bytes, frames: Sequence[Frame]) -> bool:
        """Hand an answer over to be sent; False when the peer has gone or does not read. Never waits."""
        if self._socket is None:
            return False
        sent = self._socket.send_multipart([route, *frames], flags=zmq.DONTWAIT, copy=False)
        # With DONTWAIT the future is done when it is returned.
        if isinstance(cast("asyncio.Future[object]", sent).exception(), zmq.ZMQError):
            return False
        self.bytes_sent += sum(map(nbytes, frames))
        return True

    async def close(self) -> None:
        """Close; what is not sent within a second is lost. May be called twice."""
        if self._socket is not None:
            self._socket.close(_LINGER_MS)
        if self._authenticator is not None:
            self._authenticator.stop()
            await asyncio.sleep(0)  # lets the authenticator's task end
        if self._context is not None:
            self._context.term()
        self._socket = self._authenticator = self._context = None

    def _opened(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            raise InternalError("The owner's socket is used before `start`, or after `close`.")
        return self._socket

    def _start_authenticator(self, context: zmq.asyncio.Context, allow: AllowList) -> None:
        silent = logging.Logger("zap")  # the library would log keys
        silent.disabled = True
        self._authenticator = AsyncioAuthenticator(context, log=silent)
        self._authenticator.start()
        # An allow-list never raises here, and must not: the library's task would end, and nobody would be admitted.
        question = SimpleNamespace(callback=lambda domain, key: allow.allowed(key) is not None)
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN, question)

    def _sender(self, route: zmq.Frame, frames: Sequence[zmq.Frame]) -> str | None:
        if not frames or len(route) != 5 or route.buffer[0] != 0:
            return None
        if self._keys is None:
            return INSECURE_SENDER
        try:
            return str(frames[0].get("User-Id"))
        except zmq.ZMQError:
            return None


def _check_pair(keys: KeyPair | None) -> None:
    if keys is not None and zmq.curve_public(keys.secret) != keys.public:
        raise KeyFileError("The public and the secret key do not belong together.", hint="make a new pair")


def _set_options(link: zmq.Socket[bytes] | zmq.asyncio.Socket, address: reach.Address, max_message_bytes: int) -> None:
    link.set(zmq.IPV6, int(address.is_ipv6))
    link.set(zmq.LINGER, _LINGER_MS)
    link.set(zmq.SNDHWM, QUEUE)
    link.set(zmq.RCVHWM, QUEUE)
    link.set(zmq.MAXMSGSIZE, max_message_bytes + _CURVE_OVERHEAD)
    link.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    patience = 4 * _HEARTBEAT_MS + max_message_bytes // _SLOWEST_BYTES_PER_MS
    link.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    link.set(zmq.HEARTBEAT_TIMEOUT, patience)
    link.set(zmq.HEARTBEAT_TTL, min(patience, 6_500_000))
    link.set(zmq.TCP_KEEPALIVE, 1)
