"""What peers without a server say to each other: their own tagged unions, beside those of a session with an owner.

A message is a header in msgpack and at most one frame of raw little-endian numbers. Whoever asks draws a `number`, and
the answer repeats it. Who speaks is the public key that CURVE has proven, so no message names its sender. The order of
checks is that of `splitfl.wire.frames`: number of frames, length of the header, type, integers and texts, length of the
frame against what this side expects; nothing is allocated in proportion to a number that a peer wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from splitfl.errors import printable
from splitfl.wire.codecs import Frame, nbytes
from splitfl.wire.frames import Malformed
from splitfl.wire.messages import Record

MESH_VERSION = 1
MAX_HEADER_BYTES = 8 * 1024
MAX_TAGS, MAX_TEXT = 16, 400
LARGEST = 2**53
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Part: TypeAlias = Literal["all", "A", "B"]
"""Which factors of LoRA: both, the one that reads (A), the one that writes (B)."""
RefusalCode: TypeAlias = Literal[
    "version", "model", "layout", "policy", "denied", "out_of_order", "malformed", "not_disclosed", "internal"
]


class Asked(Record, frozen=True, kw_only=True):
    """What every message carries: the number that the asking side drew."""

    number: int


# ---- from the side that asks


class Hello(Asked, frozen=True, kw_only=True, tag="hello"):
    """The first message to a peer, and the first after a lost link."""

    version: int
    model: str
    """Fingerprint of the full model that everybody has."""
    layout: str
    """Digest of the adapter's tensors, its start, the rule of averaging and the kind of sketch."""
    tags: tuple[str, ...] = ()
    """Of the policy that this server's labels follow."""


class AskSketch(Asked, frozen=True, kw_only=True, tag="ask_sketch"):
    """Ask for the similarity sketch."""


class Want(Asked, frozen=True, kw_only=True, tag="want"):
    """Ask for the newest partly trained adapter."""

    round: int
    """Rounds of local training that it must have behind it at least."""
    part: Part


class Finished(Asked, frozen=True, kw_only=True, tag="finished"):
    """This server has trained its last round and asks for nothing more."""


# ---- answers


class Welcome(Asked, frozen=True, kw_only=True, tag="welcome"):
    """Answers a hello; the fields are those of the hello."""

    version: int
    model: str
    layout: str
    tags: tuple[str, ...] = ()


class SketchIs(Asked, frozen=True, kw_only=True, tag="sketch"):
    """Frame: int32 [values], in grid steps."""

    rows: int
    grid: int
    values: int


class NoSketch(Asked, frozen=True, kw_only=True, tag="no_sketch"):
    """This server gives none."""


class Have(Asked, frozen=True, kw_only=True, tag="have"):
    """Frame: float32 [values], the LoRA factors of that part in name order."""

    round: int
    rows: int
    part: Part
    values: int


class NotYet(Asked, frozen=True, kw_only=True, tag="not_yet"):
    """There is no adapter of that round yet; `round` says how far this server is."""

    round: int


class Noted(Asked, frozen=True, kw_only=True, tag="noted"):
    """Answers `finished`."""


class Refused(Asked, frozen=True, kw_only=True, tag="refused"):
    """No, with a code, a sentence and what is allowed."""

    code: RefusalCode
    problem: str
    expected: str | None = None


Ask: TypeAlias = Hello | AskSketch | Want | Finished
Reply: TypeAlias = Welcome | SketchIs | NoSketch | Have | NotYet | Noted | Refused
Said: TypeAlias = Ask | Reply
TENSOR_OF: dict[str, str] = {"sketch": "sketch", "have": "adapter"}
"""Message to the name of the one frame that it carries; the others carry none."""

_ENCODER = msgspec.msgpack.Encoder()
_ASKS = msgspec.msgpack.Decoder(Ask)
_REPLIES = msgspec.msgpack.Decoder(Reply)
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def kind(message: Said) -> str:
    """The wire tag of a message."""
    return str(type(message).__struct_config__.tag)


def tensors_of(message: Said) -> tuple[str, ...]:
    """Names of the frames behind the header: one or none."""
    return tuple(name for tag, name in TENSOR_OF.items() if tag == kind(message))


def encode(message: Said, frame: Frame | None = None) -> list[Frame]:
    """Header, and the frame if there is one."""
    return [_ENCODER.encode(message), *([] if frame is None else [frame])]


def decode_ask(frames: Sequence[Frame]) -> Ask:
    """The question in `frames`. No question carries a frame of numbers.

    Raises:
        Malformed: it is none.
    """
    message = cast("Ask", _header(frames, _ASKS))
    _check_frames(message, frames, 0)
    return message


def decode_reply(frames: Sequence[Frame], *, expected_values: int) -> Reply:
    """The answer in `frames`, its frame checked for length.

    Args:
        frames: as they came.
        expected_values: how many numbers a frame has to hold, if there is one.

    Raises:
        Malformed: it is none, or its frame has another length.
    """
    message = cast("Reply", _header(frames, _REPLIES))
    _check_frames(message, frames, expected_values)
    return message


def floats_of(frame: Frame) -> torch.Tensor:
    """The numbers of a `have`, float32 [values], a copy; call after `decode_reply`.

    Raises:
        Malformed: a value is not finite.
    """
    values = torch.from_numpy(np.frombuffer(frame, dtype="<f4").astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise _malformed("An adapter came with values that are not finite", "finite values")
    return values


def integers_of(frame: Frame) -> npt.NDArray[np.int32]:
    """The numbers of a sketch, int32 [values], a copy; call after `decode_reply`."""
    return np.frombuffer(frame, dtype="<i4").astype(np.int32)


def frame_of_floats(values: torch.Tensor) -> bytes:
    """float32 [values] as it crosses."""
    return values.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()


def frame_of_integers(values: npt.NDArray[np.int32]) -> bytes:
    """int32 [values] as it crosses."""
    return values.astype("<i4").tobytes()


def is_tag(text: str) -> bool:
    """Whether `text` can be a policy tag."""
    return _TAG.fullmatch(text) is not None


def _header(frames: Sequence[Frame], decoder: msgspec.msgpack.Decoder[Any]) -> Said:
    if not 1 <= len(frames) <= 2:
        raise _malformed(f"A message of {len(frames)} frames came", "1 or 2 frames")
    if nbytes(frames[0]) > MAX_HEADER_BYTES:
        raise _malformed(f"A header of {nbytes(frames[0])} bytes came", f"at most {MAX_HEADER_BYTES} bytes")
    try:
        message: Said = decoder.decode(frames[0])
    except _DECODE_ERRORS as error:
        raise _malformed(
            f"A header came that is no message: {printable(str(error), 160)}", "see docs/fedmod.md"
        ) from None
    _check_fields(message)
    return message


def _check_fields(message: Said) -> None:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, int) and not 0 <= value < LARGEST:
            raise _malformed(f"The number {name!r} is out of range", "0 to 2^53")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise _malformed(f"The text {name!r} is too long", f"at most {MAX_TEXT} characters")
    if isinstance(message, Hello | Welcome) and not (
        len(message.tags) <= MAX_TAGS and len(set(message.tags)) == len(message.tags) and all(map(is_tag, message.tags))
    ):
        raise _malformed("The policy tags are not sound", f"at most {MAX_TAGS} different names")
    if isinstance(message, SketchIs | Have) and message.rows < 1:
        raise _malformed("An answer claims no rows", "1 or more")
    if isinstance(message, SketchIs) and message.grid < 1:
        raise _malformed("A sketch came without a grid", "1 step or more")


def _check_frames(message: Said, frames: Sequence[Frame], expected: int) -> None:
    wanted = len(tensors_of(message))
    if len(frames) != 1 + wanted:
        raise _malformed(f"A {kind(message)!r} message came with {len(frames) - 1} frames behind it", str(wanted))
    if isinstance(message, SketchIs | Have):
        if message.values != expected:
            raise _malformed(f"A {kind(message)!r} message tells of {message.values} numbers", str(expected))
        if nbytes(frames[1]) != 4 * expected:
            raise _malformed(
                f"The frame of a {kind(message)!r} message has {nbytes(frames[1])} bytes", f"{4 * expected}"
            )


def _malformed(problem: str, expected: str) -> Malformed:
    return Malformed(f"{problem}.", code="malformed", expected=expected)


def numbered(ask: Ask, number: int) -> Ask:
    """`ask` with that number."""
    return msgspec.structs.replace(ask, number=number)
