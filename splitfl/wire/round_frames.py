"""A round's message becomes a header and at most one raw frame; frames from a peer become a message, or are refused.

As in `splitfl.wire.frames`: a peer's bytes are believed only after they were checked. The header is bounded before it
is decoded, every text, number and list in it before it is used, and a raw frame may come only where the header says so
and be no longer than a piece. How large a whole blob may be depends on the round, and is checked by whoever knows it,
before a byte of it is kept.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from splitfl.errors import WireError, printable
from splitfl.wire.round_messages import (
    ROUND_REFUSALS,
    ROUNDS_VERSION,
    AnyRoundMessage,
    Ask,
    Enter,
    Entered,
    Facts,
    Finished,
    FromCoordinator,
    FromParty,
    Get,
    Piece,
    Put,
    Refused,
    Report,
    Task,
    kind,
)

Frame: TypeAlias = bytes | bytearray | memoryview
Side: TypeAlias = Literal["party", "coordinator"]

PIECE_BYTES = 1 << 20
WINDOW = 4
"""Pieces that a party may have under way before it waits for an answer."""
MAX_HEADER_BYTES = 64 * 1024
MAX_TEXT_BYTES = 1024
MAX_INTEGER = 2**63 - 1
MAX_LENGTHS = 4096
MAX_PARTIES = 1000
MAX_WAIT_S = 60.0
MAX_SCORE = 1e12

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FEDERATION = re.compile(r"[0-9a-f]{32}")
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class RoundViolation(WireError):
    """What came is not allowed; `code` is one of `ROUND_REFUSALS`."""

    def __init__(self, problem: str, *, code: str, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(problem, expected=expected, hint=hint)
        self.code = code


class _Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a greeting that every version keeps; others are skipped."""

    type: str
    version: int


_ENCODER = msgspec.msgpack.Encoder()
_PARTY_DECODER = msgspec.msgpack.Decoder(FromParty)
_COORDINATOR_DECODER = msgspec.msgpack.Decoder(FromCoordinator)
_GREETING_DECODER = msgspec.msgpack.Decoder(_Greeting)
_PARTS_DECODER = msgspec.msgpack.Decoder(dict[str, bytes])
_NAMES_DECODER = msgspec.msgpack.Decoder(tuple[str, ...])


# ---- messages


def encode(message: AnyRoundMessage, frame: Frame | None = None) -> list[Frame]:
    """The frames of `message`; `frame` goes with a put or a piece, and with nothing else."""
    header = _ENCODER.encode(message)
    return [header] if frame is None else [header, frame]


def decode(frames: Sequence[Frame], *, sender: Side) -> tuple[AnyRoundMessage, Frame]:
    """The message in `frames` and its raw frame (empty where there is none), checked.

    Args:
        frames: without any routing frame.
        sender: which side they came from; decides which messages exist at all.

    Raises:
        RoundViolation: with code ``malformed``, ``too_large`` or ``version``.
    """
    if not 1 <= len(frames) <= 2:
        raise malformed(f"A message of {len(frames)} frames came", "1 or 2 frames")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise too_large(f"A header of {len(frames[0])} bytes came", f"at most {MAX_HEADER_BYTES} bytes")
    message = _parse(frames[0], sender)
    _check_plain_fields(message)
    _check_fields(message)
    carries = isinstance(message, Put | Piece)
    if carries != (len(frames) == 2):
        raise malformed(f"A {kind(message)!r} message came with {len(frames) - 1} raw frames", f"{int(carries)}")
    frame = frames[1] if carries else b""
    if isinstance(message, Put | Piece):
        _check_extent(message, len(frame))
    return message, frame


def _parse(header: Frame, sender: Side) -> AnyRoundMessage:
    decoder = _PARTY_DECODER if sender == "party" else _COORDINATOR_DECODER
    try:
        message: AnyRoundMessage = decoder.decode(header)
    except _DECODE_ERRORS as error:
        _check_version(header)
        reason = printable(str(error), limit=160)
        raise malformed(f"A header came that is no message of the {sender}: {reason}", "see docs/rounds.md") from None
    if isinstance(message, Enter | Entered) and message.version != ROUNDS_VERSION:
        raise _other_version(message.version)
    return message


def _check_version(header: Frame) -> None:
    """A greeting of another version is told apart from nonsense."""
    try:
        greeting = _GREETING_DECODER.decode(header)
    except _DECODE_ERRORS:
        return
    if greeting.type in ("enter", "entered") and greeting.version != ROUNDS_VERSION:
        raise _other_version(greeting.version)


def _check_plain_fields(record: msgspec.Struct) -> None:
    """Bounds that hold for every text, number and list of texts or numbers."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, Facts):
            _check_plain_fields(value)
            continue
        values = value if isinstance(value, tuple) else (value,)
        if len(values) > MAX_LENGTHS:
            raise too_large(f"The list {name!r} is too long", f"at most {MAX_LENGTHS}")
        for one in values:
            _check_value(name, one)


def _check_value(name: str, value: object) -> None:
    if isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise too_large(f"The text {name!r} is too long", f"at most {MAX_TEXT_BYTES} bytes")
    if isinstance(value, int) and not isinstance(value, bool):
        _require(0 <= value <= MAX_INTEGER, f"The number {name!r} is out of range", "0 to 2^63 - 1")
    if isinstance(value, float):
        _require(math.isfinite(value), f"The number {name!r} is not finite", "a finite number")


def _check_fields(message: AnyRoundMessage) -> None:
    match message:
        case Enter():
            lengths = message.facts.lengths
            _require(bool(lengths) and min(lengths) > 0, "An update has no values", "lengths above 0")
            _require(1 <= len(message.facts.stages) <= 5, "The stages of a round are not sound", "1 to 5 stages")
        case Ask():
            _require(0 <= message.wait_s <= MAX_WAIT_S, "A wait is out of range", f"0 to {MAX_WAIT_S:g} seconds")
        case Report():
            _check_digest("state", message.state)
            sound = all(abs(score or 0.0) <= MAX_SCORE for score in (message.personal, message.common))
            _require(sound, "A score is out of range", f"-{MAX_SCORE:g} to {MAX_SCORE:g}")
        case Put() | Piece():
            _check_digest("digest", message.digest)
        case Get():
            _require(0 < message.size <= PIECE_BYTES, "A piece is out of range", f"1 to {PIECE_BYTES} bytes")
            _check_digest("digest", message.digest, needed=message.item == "state")
        case Entered():
            _require(bool(_FEDERATION.fullmatch(message.federation)), "A federation has no sound identity", "32 digits")
            _require(message.clip > 0 and message.max_weight > 0, "A federation allows nothing", "limits above 0")
            _require(0 < message.piece_bytes <= PIECE_BYTES, "A piece is out of range", f"up to {PIECE_BYTES} bytes")
        case Task():
            _check_digest("state", message.state, needed=bool(message.state))
            sound = list(message.parties) == sorted(set(message.parties)) and len(message.parties) <= MAX_PARTIES
            _require(sound, "The parties of a round are not sound", f"sorted, each once, at most {MAX_PARTIES}")
        case Finished():
            for name in ("state", "best_state"):
                _check_digest(name, getattr(message, name), needed=bool(getattr(message, name)))
        case Refused():
            _require(message.code in ROUND_REFUSALS, "A refusal came with an unknown code", ", ".join(ROUND_REFUSALS))


def _check_extent(message: Put | Piece, size: int) -> None:
    """A raw frame is one piece, and lies within the blob that it says it is part of."""
    if size > PIECE_BYTES:
        raise too_large(f"A piece of {size} bytes came", f"at most {PIECE_BYTES} bytes")
    within = message.offset + size <= message.total
    _require(within, "A piece ends beyond its blob", "an offset and a length within the total")
    _require(size > 0 or message.total == 0, "An empty piece came", "at least 1 byte")


def _check_digest(name: str, value: str, *, needed: bool = True) -> None:
    sound = bool(_DIGEST.fullmatch(value)) if needed else value == ""
    _require(sound, f"The {name} is no digest", "64 hexadecimal digits" if needed else "nothing")


# ---- blobs


def digest_of(blob: Frame) -> str:
    """BLAKE2b-256, as 64 hexadecimal digits."""
    return hashlib.blake2b(blob, digest_size=32).hexdigest()


def pack_parts(parts: Mapping[str, bytes]) -> bytes:
    """One blob out of one for each party, in the order of their keys: the same parts give the same bytes."""
    return _ENCODER.encode({name: parts[name] for name in sorted(parts)})


def unpack_parts(blob: Frame, *, names: Sequence[str] | None = None, largest: int) -> dict[str, bytes]:
    """The parts of `pack_parts`.

    Args:
        blob: no longer than its reader allows.
        names: the parties that must be in it, no others; None if only the other side knows.
        largest: bytes of one part.

    Raises:
        RoundViolation: it does not decode, names others, or a part is too large.
    """
    try:
        parts = _PARTS_DECODER.decode(blob)
    except _DECODE_ERRORS:
        raise malformed("Parts for the parties came that do not decode", "a map of keys to bytes") from None
    if names is not None and sorted(parts) != sorted(names):
        raise malformed(
            f"Parts for {len(parts)} parties came that are not those asked for", f"one for each {len(names)}"
        )
    if len(parts) > MAX_PARTIES or any(len(name) > MAX_TEXT_BYTES for name in parts):
        raise too_large("Parts for too many parties came", f"at most {MAX_PARTIES}")
    if any(len(part) > largest for part in parts.values()):
        raise too_large("A part for a party is too large", f"at most {largest} bytes")
    return parts


def pack_names(names: Sequence[str]) -> bytes:
    """A list of parties as a blob."""
    return _ENCODER.encode(tuple(names))


def unpack_names(blob: Frame) -> tuple[str, ...]:
    """The list of `pack_names`.

    Raises:
        RoundViolation: it does not decode, or is not sorted with each name once.
    """
    try:
        names = _NAMES_DECODER.decode(blob)
    except _DECODE_ERRORS:
        raise malformed("A list of parties came that does not decode", "a list of keys") from None
    _require(list(names) == sorted(set(names)), "A list of parties is not sound", "sorted, each once")
    return names


# ---- refusals


def malformed(problem: str, expected: str) -> RoundViolation:
    """A refusal of bytes or fields that make no sense."""
    return RoundViolation(f"{problem}.", code="malformed", expected=expected)


def too_large(problem: str, expected: str) -> RoundViolation:
    """A refusal of more than there may be."""
    return RoundViolation(f"{problem}.", code="too_large", expected=expected)


def _require(holds: bool, problem: str, expected: str) -> None:
    if not holds:
        raise malformed(problem, expected)


def _other_version(version: int) -> RoundViolation:
    return RoundViolation(
        f"The other side speaks version {version} of the rounds' messages.",
        code="version",
        expected=f"version {ROUNDS_VERSION}",
        hint="install the same splitfl release on both sides",
    )
