"""What is fuzzed: each target reads frames as the code that meets a peer's bytes does, and allows what that may raise.

A target raises if a decoder lets anything out but its declared errors, or if what it returns breaks what it promises:
tensors larger than the frames they came in, a message that its own encoder would not write again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from protocols import PROTOCOLS
from splitfl.adapter_check import _read_config
from splitfl.aggregation.identity import signing_key
from splitfl.aggregation.logits import LogitLayout, read_knowledge, read_upload
from splitfl.aggregation.mask_blobs import Layout
from splitfl.aggregation.plain import PlainSummer
from splitfl.aggregation.sealed import open_sealed, signed
from splitfl.aggregation.shamir import combine
from splitfl.aggregation.sums import RoundTerms
from splitfl.audit.recording import End, Reader, Room, Writer
from splitfl.emulator import read_emulator_plan
from splitfl.errors import DataError, KeyFileError, ModelError, WireError
from splitfl.kit import PLAN_FILE, open_kit
from splitfl.wire import frames as wire
from splitfl.wire import mesh_messages as mesh
from splitfl.wire import round_frames as rounds
from splitfl.wire.keys import KeyPair, load_public
from splitfl.wire.messages import AnyMessage, CodingName, DtypeName, Welcome
from splitfl.wire.round_messages import ROUND_REFUSALS
from splitfl.wire.session import NotAllowed, OwnerSession, PartySession, Session, Terms

Frames = Sequence[bytes]

WIDTH, SESSION = 4, 77
_DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16")
_CODINGS: tuple[CodingName, ...] = ("raw", "grid16", "int8", "int4", "topk")
# A decoder may make float32 of 4-bit codes, or a full row of each kept value; never more than that.
_GROWTH, _BEYOND = 8 * 2, 4096


@dataclass(frozen=True)
class Target:
    """One decoder."""

    name: str
    read: Callable[[Frames], None]


def limits(coding: CodingName = "raw", dtype: DtypeName = "float32") -> wire.Limits:
    """Narrow ones, so that inputs near them are short."""
    return wire.Limits(
        width=WIDTH, max_tokens=24, max_length=8, wire_dtype=dtype, hidden_coding=coding, gradient_coding=coding
    )


def read_message(frames: Frames, sender: wire.Sender) -> None:
    """A message of a session: header, sizes, tensors, then whether it may be said now."""
    try:
        message = wire.open_header(frames, sender=sender)
    except wire.Violation as violation:
        _must(violation.code in wire.REFUSAL_CODES)
        return
    for coding in _CODINGS:
        for dtype in _DTYPES:
            with suppress(wire.Malformed):
                wire.check_frames(message, frames, limits(coding, dtype))
                _open_tensors(message, frames)
    again = wire.open_header([msgspec.msgpack.encode(message), *frames[1:]], sender=sender)
    assert again == message or _has_nan(message)
    for session in _sessions(sender):
        with suppress(NotAllowed):
            session.receive(message)


def _must(holds: bool) -> None:
    assert holds


def _open_tensors(message: AnyMessage, frames: Frames) -> None:
    held = sum(tensor.nbytes for tensor in wire.tensors_of(message, frames).values())
    assert held <= _GROWTH * sum(map(len, frames[1:])) * WIDTH + _BEYOND, f"{held} bytes"


def _has_nan(message: AnyMessage) -> bool:
    values = [getattr(message, "lease_s", 0.0), *(spec.step for spec in message.tensors)]
    return any(value != value for value in values)


def _sessions(sender: wire.Sender) -> list[Session]:
    """A fresh one, and an open one."""
    agreed = Terms(session=SESSION, protocol="split", trunk="trunk", plan="plan", wire_dtype="float32", memory="keep")
    disclosure = PROTOCOLS["split"].disclosure
    kind = OwnerSession if sender == "party" else PartySession
    fresh, opened = kind(agreed, disclosure), kind(agreed, disclosure)
    hello = agreed.hello()
    welcome = Welcome(
        session=SESSION, version=hello.version, max_tokens=24, max_length=8, memory="keep", lease_s=9.0, server=""
    )
    if isinstance(opened, OwnerSession):
        opened.receive(hello)
        opened.send(welcome)
    else:
        opened.send(hello)
        opened.receive(welcome)
    return [fresh, opened]


def read_round(frames: Frames, sender: rounds.Side) -> None:
    """A message between a party and a coordinator."""
    try:
        _, frame = rounds.decode(frames, sender=sender)
        assert len(frame) <= rounds.PIECE_BYTES
    except rounds.RoundViolation as violation:
        _must(violation.code in ROUND_REFUSALS)


def read_parts(frames: Frames) -> None:
    """Blobs that a coordinator hands on."""
    with suppress(rounds.RoundViolation):
        parts = rounds.unpack_parts(frames[0], largest=64)
        assert rounds.unpack_parts(rounds.pack_parts(parts), largest=64) == parts
    with suppress(rounds.RoundViolation):
        rounds.unpack_names(frames[0])


def read_ask(frames: Frames) -> None:
    """A question of a peer without a server."""
    with suppress(wire.Malformed):
        mesh.decode_ask(frames)


def read_reply(frames: Frames) -> None:
    """Its answer, and the numbers behind it."""
    with suppress(wire.Malformed):
        reply = mesh.decode_reply(frames, expected_values=5)
        if isinstance(reply, mesh.Have):
            assert mesh.floats_of(frames[1]).numel() == 5
        if isinstance(reply, mesh.SketchIs):
            assert mesh.integers_of(frames[1]).size == 5


# ---- between the parties of a round


@cache
def pairs() -> tuple[KeyPair, KeyPair, KeyPair]:
    """Three parties, in the order of their public keys; the same in every process, for what was sealed to them."""
    secrets = [z85.encode(bytes([number] * 32)) for number in (1, 2, 3)]
    made = (KeyPair(public=zmq.curve_public(secret), secret=secret) for secret in secrets)
    one, two, three = sorted(made, key=lambda pair: pair.public)
    return one, two, three


@cache
def terms() -> RoundTerms:
    """A round of theirs."""
    names = tuple(pair.public.decode() for pair in pairs())
    return RoundTerms(
        federation="0f" * 16, round=1, attempt=0, length=6, clip=1.0, max_weight=9.0, layout="layout", parties=names
    )


def read_sealed(frames: Frames) -> None:
    """A blob sealed to key files. A party of the round is the attacker: it signs whatever it likes."""
    sender, receiver, _ = pairs()
    name, identity = sender.public.decode(), signing_key(sender)
    own = signed(identity, b"sealed fuzz", b"\0" * 32, name, frames[0])
    for blob in (own, frames[0]):
        with suppress(WireError):
            open_sealed(blob, receiver, name, identity.public_key(), b"fuzz", b"\0" * 32)


def read_masks(frames: Frames) -> None:
    """Trailer, reveal and result of a masked sum, cut or filled to the length that is checked before."""
    layout, parties = Layout(terms()), terms().parties
    body = frames[0]
    with suppress(WireError):
        layout.read_trailer(_at_length(body, layout.trailer_bytes))
    with suppress(WireError):
        layout.read_reveal(_at_length(body, layout.reveal_body(3, 2)), parties, parties[:2])
    for result in (body, _at_length(body, layout.result_bytes)):
        with suppress(WireError):
            assert layout.read_result(result, body[:32].ljust(32, b"\0"), parties).size == layout.numbers
    with suppress(WireError):
        combine(dict(enumerate(frames, start=1)))


def read_plain(frames: Frames) -> None:
    """An update in the clear, as it came and with its last 32 bytes right."""
    for blob in (frames[0], frames[0] + PlainSummer(terms())._binding):
        with suppress(WireError):
            PlainSummer(terms()).accept(terms().parties[0], blob)


LOGITS = LogitLayout(positions=3, classes=9, keep=2, temperature=1.0)
DENSE = LogitLayout(positions=2, classes=3, keep=3, temperature=2.0)


def read_logits(frames: Frames) -> None:
    """Logits of a party, and what the coordinator made of them."""
    for layout in (LOGITS, DENSE):
        with suppress(WireError):
            read_upload(frames[0], layout_digest=layout.digest, max_weight=9.0)
        with suppress(WireError):
            known = read_knowledge(frames[0], layout)
            assert known.counts.sum() == len(known.ids) == len(known.log_probabilities)


# ---- files that come from somebody else


@cache
def folder() -> Path:
    """One for all files of this process; removed when it ends."""
    _HELD.append(tempfile.TemporaryDirectory(prefix="splitfl-fuzz-"))
    return Path(_HELD[-1].name)


_HELD: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(content)
    return path


def read_kit(frames: Frames) -> None:
    """The plan of a kit."""
    path = _file(PLAN_FILE, frames[0]).parent
    with suppress(ModelError):
        plan = open_kit(path).plan
        assert plan.digest
        assert 0 <= plan.bottom < plan.layers - plan.top <= plan.layers
        assert len(plan.party_layers) == plan.bottom + plan.top


def read_emulator(frames: Frames) -> None:
    """The plan of an emulator, as it comes from an owner."""
    with suppress(ModelError):
        plan = read_emulator_plan(frames[0], Path("emulator"))
        assert all("/" not in name for name in plan.files)


def read_adapter(frames: Frames) -> None:
    """The configuration of an adapter that a party hands in."""
    with suppress(ModelError):
        _read_config(_file("adapter_config.json", frames[0]))


def read_key(frames: Frames) -> None:
    """A public key file."""
    with suppress(KeyFileError):
        load_public(_file("someone.key", frames[0]))


def read_recording(frames: Frames) -> None:
    """A recording: altered, and one whose writer put anything whatever behind the right key."""
    key, path = bytes(32), folder() / "traffic-000.rec"
    path.unlink(missing_ok=True)
    writer = Writer(path, key, stream="traffic", number=0, room=Room(1 << 20))
    writer._put(writer._sealed(frames[0], frames[1:]))
    writer._put(writer._sealed(msgspec.msgpack.encode(End(records=1)), ()))
    writer._closed = True
    os.close(writer._open)  # `close` waits for the disk
    sealed = path.read_bytes()
    for content in (sealed, sealed[: len(frames[0])], frames[0], sealed[:41] + frames[0]):
        with suppress(DataError):
            list(Reader(path=_file("read.rec", content), key=key, stream="traffic", number=0))


def _at_length(body: bytes, length: int) -> bytes:
    return body[:length].ljust(length, b"\0")


TARGETS: tuple[Target, ...] = (
    Target("messages of a party", lambda frames: read_message(frames, "party")),
    Target("messages of an owner", lambda frames: read_message(frames, "owner")),
    Target("rounds, of a party", lambda frames: read_round(frames, "party")),
    Target("rounds, of a coordinator", lambda frames: read_round(frames, "coordinator")),
    Target("rounds, parts and names", read_parts),
    Target("mesh, questions", read_ask),
    Target("mesh, answers", read_reply),
    Target("sealed blobs", read_sealed),
    Target("masked sums", read_masks),
    Target("plain sums", read_plain),
    Target("logits", read_logits),
    Target("kit", read_kit),
    Target("emulator", read_emulator),
    Target("adapter", read_adapter),
    Target("key files", read_key),
    Target("recordings", read_recording),
)
"""In the order of their numbers; a new one goes to the end, since the corpus names them by number."""
