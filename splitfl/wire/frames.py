"""Step 6 of the journey: a message becomes a list of frames, and frames from a peer become a message, or are refused.

The first frame is the header (msgpack, one tagged union a direction); each further frame is one tensor, in the order of
`Message.tensors`. Two rules hold in this file:

- A peer's bytes are believed only after they were checked. `open_header` looks at nothing but the header, and
  `check_frames` compares the sizes it declares with the session's limits and with the frames that came. Until both have
  passed no tensor byte is read and nothing is allocated in proportion to a number that a peer wrote.
- What is wrong is said as `Malformed`, with a code that the owner can answer with. Nothing else comes out.

Sizes are Python integers, so a product of huge dimensions is a huge number and never a small one.

Legend of shapes: B rows, T new positions, S cached plus new positions, D width of the cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec
import torch

from splitfl.errors import InternalError, WireError, printable
from splitfl.wire.codecs import Frame, dtype_name, frame_bytes, from_frame, nbytes, spec_of, to_frame
from splitfl.wire.coding import WIDEST, Coded
from splitfl.wire.messages import (
    LONGEST_PAUSE_S,
    REFUSAL_CODES,
    WIRE_VERSION,
    AnyMessage,
    Backward,
    CodingName,
    DtypeName,
    Fetch,
    Forward,
    FromOwner,
    FromParty,
    Hello,
    Piece,
    Refused,
    Release,
    TensorName,
    TensorSpec,
    Welcome,
    kind,
)
from splitfl.wire.pieces import flaw

Sender: TypeAlias = Literal["party", "owner"]

MAX_TENSORS = 8
MAX_HEADER_BYTES = 64 * 1024
MAX_TEXT_BYTES = 1024
MAX_INTEGER = 2**63 - 1
FLOAT_DTYPES: frozenset[str] = frozenset({"float32", "float16", "bfloat16"})

# Message kind -> (tensors it must carry, tensors it may carry). A kind that is not listed carries none.
TENSORS_OF: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "forward": (frozenset({"hidden"}), frozenset({"mask", "positions"})),
    "backward": (frozenset({"gradient"}), frozenset()),
    "forward_done": (frozenset({"hidden"}), frozenset()),
    "backward_done": (frozenset({"gradient"}), frozenset()),
    "piece": (frozenset({"piece"}), frozenset()),
}
_NO_TENSORS: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
# Tensors whose dtype does not follow the session's wire dtype.
_FIXED_DTYPES: dict[str, DtypeName] = {"mask": "uint8", "positions": "int32", "piece": "uint8"}

_RANKS: dict[str, int] = {"hidden": 3, "gradient": 3, "mask": 2, "positions": 2, "piece": 1}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one message of a session may hold at most."""

    width: int
    """D, the width of the cut: every hidden and gradient frame has exactly this last dimension."""
    max_tokens: int
    """Largest B x T of a request, and largest B x S of a cache."""
    max_length: int
    """Longest sequence, in positions: bounds T and S."""
    wire_dtype: DtypeName
    """Dtype of hidden and gradient frames, both ways."""
    hidden_coding: CodingName = "raw"
    """How the party's hidden frames are coded; the owner's never are."""
    gradient_coding: CodingName = "raw"


class Violation(WireError):
    """What came, or was about to leave, is not allowed; `code` is one of `REFUSAL_CODES`."""

    def __init__(self, problem: str, *, code: str, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(problem, expected=expected, hint=hint)
        self.code = code


class Malformed(Violation):
    """The frames do not decode, or their sizes do not agree with the header or the limits."""


class _Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """The two fields of a hello or welcome that every wire version keeps; others are skipped."""

    type: str
    version: int


_ENCODER = msgspec.msgpack.Encoder()
_PARTY_DECODER = msgspec.msgpack.Decoder(FromParty)
_OWNER_DECODER = msgspec.msgpack.Decoder(FromOwner)
_GREETING_DECODER = msgspec.msgpack.Decoder(_Greeting)
# What msgspec raises on bytes that are not the type: its own errors, bad UTF-8, and nesting beyond the stack.
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


# ---- out


def describe(
    message: AnyMessage, tensors: Mapping[TensorName, torch.Tensor | Coded], wire_dtype: DtypeName | None = None
) -> AnyMessage:
    """`message` with its `tensors` field set to what `tensors` will look like on the wire.

    Args:
        message: any message; whatever its `tensors` field holds is replaced.
        tensors: name to tensor, or to what a mechanism coded, in the order in which they are to travel.
        wire_dtype: dtype of hidden and gradient frames; by default the dtype that the tensor has.
    """
    specs = tuple(_spec(name, tensor, wire_dtype) for name, tensor in tensors.items())
    return msgspec.structs.replace(message, tensors=specs)


def _spec(name: TensorName, tensor: torch.Tensor | Coded, wire_dtype: DtypeName | None) -> TensorSpec:
    if isinstance(tensor, Coded):
        dtype = wire_dtype or "float32"
        return TensorSpec(
            name=name, dtype=dtype, shape=tensor.shape, coding=tensor.coding, step=tensor.step, kept=tensor.kept
        )
    return spec_of(name, tensor, _FIXED_DTYPES.get(name) or wire_dtype or dtype_name(tensor.dtype))


def encode(
    message: AnyMessage, tensors: Mapping[TensorName, torch.Tensor | Coded], wire_dtype: DtypeName | None = None
) -> list[Frame]:
    """The frames of `message`: its header, then one frame a tensor.

    The frames may share memory with `tensors` (see `codecs`): keep both as they are until the answer has come, so that
    a retry carries the same bytes.

    Args:
        message: its `tensors` field is set here, unless `describe` has already set it.
        tensors: name to tensor, any device, in the order in which they are to travel.
        wire_dtype: dtype of hidden and gradient frames; by default the dtype that the tensor has.

    Raises:
        InternalError: `message` was described for other tensors than these.
    """
    described = message if message.tensors else describe(message, tensors, wire_dtype)
    if [(s.name, s.shape) for s in described.tensors] != [(n, tuple(t.shape)) for n, t in tensors.items()]:
        raise InternalError(f"A {kind(message)!r} message was described for other tensors than it is sent with.")
    header = _ENCODER.encode(described)
    return [header, *(_frame(tensors[spec.name], spec.dtype) for spec in described.tensors)]


def _frame(tensor: torch.Tensor | Coded, dtype: DtypeName) -> Frame:
    return tensor.payload.numpy().data if isinstance(tensor, Coded) else to_frame(tensor, dtype)


# ---- in


def decode(frames: Sequence[Frame], *, sender: Sender, limits: Limits) -> AnyMessage:
    """The message in `frames`, fully checked; its tensors are then safe to open with `tensors_of`.

    Args:
        frames: header and tensor frames, without any routing frame.
        sender: which side they came from; decides which messages exist at all.
        limits: the session's limits.

    Raises:
        Malformed: with code ``malformed``, ``too_large`` or ``version``.
    """
    message = open_header(frames, sender=sender)
    check_frames(message, frames, limits)
    return message


def open_header(frames: Sequence[Frame], *, sender: Sender) -> AnyMessage:
    """The first half of `decode`, for whoever must see the session number before it knows the limits.

    Raises:
        Malformed: with code ``malformed``, ``too_large`` or ``version``.
    """
    if not 1 <= len(frames) <= 1 + MAX_TENSORS:
        raise _malformed(f"A message of {len(frames)} frames came", f"1 to {1 + MAX_TENSORS} frames")
    header = frames[0]
    if nbytes(header) > MAX_HEADER_BYTES:
        raise _too_large(f"A header of {nbytes(header)} bytes came", f"at most {MAX_HEADER_BYTES} bytes")
    message = _parse(header, sender)
    _check_fields(message)
    if len(frames) != 1 + len(message.tensors):
        raise _malformed(
            f"A {kind(message)!r} message came with {len(frames) - 1} tensor frames",
            f"{len(message.tensors)}, as its header lists",
        )
    return message


def check_frames(message: AnyMessage, frames: Sequence[Frame], limits: Limits) -> None:
    """The second half of `decode`: names, dtypes, shapes and lengths of the tensor frames, none of which is read.

    Raises:
        Malformed: with code ``malformed`` or ``too_large``.
    """
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in message.tensors}
    _check_names(message, specs)
    for spec in message.tensors:
        _check_dtype(spec, limits)
        _check_coding(message, spec, limits)
    _check_shapes(message, specs, limits)
    for spec, frame in zip(message.tensors, frames[1:], strict=True):
        if nbytes(frame) != frame_bytes(spec):
            raise _malformed(f"The frame of {spec.name!r} has {nbytes(frame)} bytes", f"{frame_bytes(spec)} bytes")


def tensors_of(message: AnyMessage, frames: Sequence[Frame]) -> dict[TensorName, torch.Tensor]:
    """Name to CPU tensor, sharing the memory of `frames` where that is possible. Call after `decode`.

    Raises:
        Malformed: a coded frame names a column that the tensor does not have.
    """
    try:
        return {spec.name: from_frame(frame, spec) for spec, frame in zip(message.tensors, frames[1:], strict=True)}
    except Malformed:
        raise
    except WireError as error:
        raise Malformed(error.problem, code="malformed", expected=error.expected) from None


# ---- the header


def _parse(header: Frame, sender: Sender) -> AnyMessage:
    """The header as a message of that sender; a greeting of another wire version is told apart from nonsense."""
    decoder = _PARTY_DECODER if sender == "party" else _OWNER_DECODER
    try:
        message: AnyMessage = decoder.decode(header)
    except _DECODE_ERRORS as error:
        _check_version(header)
        reason = printable(str(error), limit=160)
        raise _malformed(f"A header came that is no message of the {sender}: {reason}", "see docs/wire.md") from None
    if isinstance(message, Hello | Welcome) and message.version != WIRE_VERSION:
        raise _other_version(message.version)
    return message


def _check_version(header: Frame) -> None:
    try:
        greeting = _GREETING_DECODER.decode(header)
    except _DECODE_ERRORS:
        return
    if greeting.type in ("hello", "welcome") and greeting.version != WIRE_VERSION:
        raise _other_version(greeting.version)


def _check_fields(message: AnyMessage) -> None:
    """Bounds that hold whatever the session: integers, texts, choices."""
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise _too_large(f"The text {name!r} is too long", f"at most {MAX_TEXT_BYTES} bytes")
        if isinstance(value, int) and not isinstance(value, bool):
            _check_integer(name, value)
    match message:
        case Hello():
            _require(message.wire_dtype in FLOAT_DTYPES, "A hello asks for an integer wire dtype", "a float dtype")
        case Forward():
            alone = message.cache is None and (message.past != 0 or message.rows is not None)
            _require(not alone, "A forward refers to cached positions", "`past` and `rows` only with `cache`")
            _check_integers("rows", message.rows or ())
        case Release():
            _check_integers("caches", message.caches)
            _check_integers("steps", message.steps)
        case Welcome():
            _require(message.max_tokens > 0 and message.max_length > 0, "A welcome allows nothing", "limits above 0")
            _require(0 < message.lease_s < math.inf, "A welcome names no possible lease", "seconds, above 0")
        case Refused():
            _require(message.code in REFUSAL_CODES, "A refusal came with an unknown code", ", ".join(REFUSAL_CODES))
            pause = message.retry_after_s or 0.0
            _require(0 <= pause <= LONGEST_PAUSE_S, "A refusal names no possible pause", "seconds, at most a week")


def _check_integers(name: str, values: tuple[int, ...]) -> None:
    for value in values:
        _check_integer(name, value)


def _check_integer(name: str, value: int) -> None:
    _require(0 <= value <= MAX_INTEGER, f"The number {name!r} is out of range", "0 to 2^63 - 1")


# ---- the tensors


def _check_names(message: AnyMessage, specs: Mapping[str, TensorSpec]) -> None:
    required, optional = TENSORS_OF.get(kind(message), _NO_TENSORS)
    if len(specs) != len(message.tensors):
        raise _malformed(f"A {kind(message)!r} message names a tensor twice", "each name once")
    if not required <= set(specs) <= required | optional:
        allowed = ", ".join([*sorted(required), *(f"{name} (optional)" for name in sorted(optional))])
        raise _malformed(
            f"A {kind(message)!r} message carries the tensors {sorted(specs) or 'none'}", allowed or "no tensors"
        )


def _check_dtype(spec: TensorSpec, limits: Limits) -> None:
    expected = _FIXED_DTYPES.get(spec.name, limits.wire_dtype)
    if spec.dtype != expected:
        raise _malformed(f"The frame of {spec.name!r} is said to be {spec.dtype}", expected)


def _check_coding(message: AnyMessage, spec: TensorSpec, limits: Limits) -> None:
    expected: CodingName = "raw"
    if isinstance(message, Forward) and spec.name == "hidden":
        expected = limits.hidden_coding
    elif isinstance(message, Backward):
        expected = limits.gradient_coding
    if spec.coding != expected:
        raise _malformed(f"The frame of {spec.name!r} is said to be coded as {spec.coding}", expected)
    if spec.coding == "grid16":
        fits = math.isfinite(spec.step) and spec.step > 0 and math.frexp(spec.step)[0] == 0.5
        _require(fits and 2.0**-60 <= spec.step <= 2.0**60, "A grid step is not sound", "a power of two, 2^-60 to 2^60")
    else:
        _require(spec.step == 0, "A grid step came without a grid", "0")
    if spec.coding == "topk":
        _require(0 < spec.kept <= min(limits.width, WIDEST), "A number of kept values is not sound", "1 to the width")
    else:
        _require(spec.kept == 0, "A number of kept values came without top-k", "0")


def _check_shapes(message: AnyMessage, specs: Mapping[str, TensorSpec], limits: Limits) -> None:
    for spec in message.tensors:
        rank = _RANKS[spec.name]
        sound = len(spec.shape) == rank and all(n > 0 for n in spec.shape)
        _require(sound, f"The shape of {spec.name!r} is not sound", f"{rank} dimensions above 0")
    if isinstance(message, Fetch | Piece) and (found := flaw(message)) is not None:
        raise Malformed(found.problem, code=found.code, expected=found.expected)
    main = specs.get("hidden") or specs.get("gradient")
    if main is None:
        return
    rows, new, width = main.shape
    if width != limits.width:
        raise _malformed(f"The last dimension of {main.name!r} does not fit the cut", f"{limits.width}")
    _check_extent(main.name, rows, new, limits)
    if mask := specs.get("mask"):
        _require(
            mask.shape[0] == rows and mask.shape[1] >= new, "The mask does not fit the hidden state", "[B, S >= T]"
        )
        _check_extent("mask", rows, mask.shape[1], limits)
    if positions := specs.get("positions"):
        fits = positions.shape[0] in (1, rows) and positions.shape[1] == new
        _require(fits, "The positions do not fit the hidden state", "[B or 1, T]")
    if isinstance(message, Forward):
        _check_extent("hidden, with its cache,", rows, message.past + new, limits)
        reordered = message.rows is None or 1 <= len(message.rows) <= limits.max_tokens
        _require(reordered, "A forward reorders too many rows, or none", f"1 to {limits.max_tokens} rows")


def _check_extent(name: str, rows: int, positions: int, limits: Limits) -> None:
    if positions > limits.max_length:
        raise _too_large(f"The frame of {name} is too long", f"at most {limits.max_length} positions")
    if rows * positions > limits.max_tokens:
        raise _too_large(f"The frame of {name} holds too many tokens", f"at most {limits.max_tokens} rows x positions")


# ---- refusals


def _require(holds: bool, problem: str, expected: str) -> None:
    if not holds:
        raise _malformed(problem, expected)


def _malformed(problem: str, expected: str) -> Malformed:
    return Malformed(f"{problem}.", code="malformed", expected=expected)


def _too_large(problem: str, expected: str) -> Malformed:
    hint = "send smaller batches or shorter sequences"
    return Malformed(f"{problem}.", code="too_large", expected=expected, hint=hint)


def _other_version(version: int) -> Malformed:
    return Malformed(
        f"The other side speaks wire version {version}.",
        code="version",
        expected=f"version {WIRE_VERSION}",
        hint="install the same splitfl release on both sides",
    )
