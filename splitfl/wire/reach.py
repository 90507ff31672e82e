"""Where the other side is: addresses, a plain look at what answers there, and why no link came up. No zmq here."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from time import monotonic

from splitfl.errors import KeyFileError, RefusedError, UnreachableError, UsageError, printable
from splitfl.wire.keys import KeyPair, fingerprint

_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+|\*):(?P<port>\d{1,5})")

# A ZMTP 3 greeting is 64 bytes: signature (10), version (2), mechanism (20), and filler. After signature and version a
# peer names its mechanism; it is not told ours, for at another one it would hang up before we have read what it said.
_SIGNATURE, _VERSION, _GREETING_BYTES = b"\xff" + bytes(8) + b"\x7f", b"\x03\x00", 64


@dataclass(frozen=True, kw_only=True)
class Address:
    """Host and port of a ``tcp://`` address; ``*`` stands for every interface and is only for binding."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{f'[{self.host}]' if self.is_ipv6 else self.host}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is a literal IPv6 address."""
        return ":" in self.host

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be meant. No name but ``localhost`` counts: others may resolve to anywhere."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def endpoint(self) -> str:
        """The address for libzmq, which does not bind to the name ``localhost``."""
        return str(Address(host="127.0.0.1", port=self.port)) if self.host == "localhost" else str(self)


def parse_address(text: str) -> Address:
    """`text` as an address.

    Raises:
        UsageError: it is not of the form ``tcp://HOST:PORT``.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise UsageError(
            f"{printable(text, limit=120)!r} is not an address.",
            expected="tcp://HOST:PORT, for instance tcp://127.0.0.1:5555 or tcp://[::1]:5555",
        )
    return Address(host=match["host"].strip("[]"), port=int(match["port"]))


def check_security(address: Address, keys: KeyPair | None, other_side: object, insecure_loopback: bool) -> None:
    """Refuse an unencrypted channel unless it was asked for by name and stays on this machine.

    Args:
        address: where to connect or bind.
        keys: our own pair.
        other_side: how the other side is known: its public key, or the list of keys to admit.
        insecure_loopback: whether an unencrypted channel was asked for.

    Raises:
        UsageError: something is missing, or too much was given.
    """
    if keys is not None and insecure_loopback:
        raise UsageError("Keys were given for a channel that is to be unencrypted.", hint="leave out one of the two")
    if keys is not None and other_side is None:
        raise UsageError(
            f"How to know the other side at {address} was not said.",
            hint="a party gives --owner-key FILE, an owner gives --parties FOLDER",
        )
    if keys is None and not insecure_loopback:
        raise UsageError(f"No key was given for {address}.", hint="make one with: splitfl keys new NAME")
    if keys is None and not address.is_loopback:
        raise UsageError(
            f"The channel to {address} would be unencrypted.",
            expected="an address on this machine (127.0.0.1, ::1 or localhost), or keys",
        )


# ---- a plain look


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a plain connection saw."""

    words: str
    """For an error message."""
    mechanism: str | None = None
    """The ZeroMQ security mechanism that is spoken there, if it is ZeroMQ at all."""
    answered: bool = False
    """Something was said."""


def look(address: Address, timeout_s: float) -> Sight:
    """Connect, begin as a ZeroMQ peer does (nothing secret), and report what comes back within `timeout_s`."""
    deadline = monotonic() + timeout_s
    host = "127.0.0.1" if address.host == "localhost" else address.host
    try:
        with socket.create_connection((host, address.port), timeout=timeout_s) as link:
            link.sendall(_SIGNATURE + _VERSION)
            return _read_greeting(link, deadline)
    except OSError as error:
        return Sight(words=_reason(error))


def _read_greeting(link: socket.socket, deadline: float) -> Sight:
    """Read at most 64 bytes, until `deadline`."""
    came = b""
    try:
        while len(came) < _GREETING_BYTES and (left := deadline - monotonic()) > 0:
            link.settimeout(left)
            part = link.recv(_GREETING_BYTES - len(came))
            if not part:
                break
            came += part
    except OSError as error:
        if not came:
            return Sight(words=f"the connection was made, then: {_reason(error)}")
    if not came:
        return Sight(words="the connection was made and closed again without a word")
    if len(came) < _GREETING_BYTES or came[:1] != _SIGNATURE[:1] or came[9:10] != _SIGNATURE[9:]:
        return Sight(words="something answers that is not a splitfl owner", answered=True)
    mechanism = printable(came[12:32].rstrip(b"\0").decode("ascii", "replace"), limit=20)
    return Sight(words=f"a ZeroMQ peer with {mechanism} security answers", mechanism=mechanism, answered=True)


def _reason(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else (error.strerror or type(error).__name__).lower()


# ---- what went wrong


def unreachable(address: Address, seen: Sight, timeout_s: float | None = None) -> UnreachableError:
    """Nobody answered, or not an owner."""
    waited = "" if timeout_s is None else f" within {timeout_s:g} s"
    return UnreachableError(
        f"No owner could be reached at {address}{waited}: {seen.words}.",
        hint="check the address, that `splitfl serve` runs there, and that nothing on the way blocks the port",
    )


def raise_if_hopeless(address: Address, seen: Sight, pinned: bytes | None, failures: int) -> None:
    """After a failed handshake: raise if waiting longer cannot help.

    Args:
        address: of the owner.
        seen: what answers there.
        pinned: the owner's public key (Z85), or None on an unencrypted channel.
        failures: how many handshakes in a row have failed, each beside a look that saw an owner.

    Raises:
        UnreachableError: something answers that is not an owner, or one with another security than ours.
        KeyFileError: an owner answers, but it cannot prove the key that is pinned here.
    """
    if seen.answered and seen.mechanism != ("NULL" if pinned is None else "CURVE"):
        raise unreachable(address, seen)
    if seen.mechanism == "CURVE" and pinned is not None and failures >= 3:
        raise KeyFileError(
            f"An owner answers at {address}, but it does not hold the key that is pinned here.",
            expected=f"an owner with the fingerprint {fingerprint(pinned)}",
            hint="compare it with the one that `splitfl serve` prints, and ask the owner for its public key file",
        )


def not_admitted(address: Address, keys: KeyPair | None) -> RefusedError:
    """The owner answers and does not want this party."""
    mine = f" ({fingerprint(keys.public)})" if keys is not None else ""
    return RefusedError(
        f"The owner at {address} does not admit this key{mine}.",
        code="revoked",
        hint="send the public key file to the owner, and ask for: splitfl keys allow NAME.key",
    )
