"""Step 6 of the journey: every message that may cross, as a typed record in one tagged union.

A message is a small header; its tensors travel behind it as raw frames, in the order of `tensors`. Field rules, so
that versions can meet: new fields get defaults, no field changes its type, a change that breaks either raises
`WIRE_VERSION`. Nothing here carries a token id, a label or a row.

Legend of shapes: B rows, T new positions, S cached plus new positions, D width of the cut, N bytes of a file.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

WIRE_VERSION = 2

TensorName: TypeAlias = Literal["hidden", "gradient", "mask", "positions", "piece"]
DtypeName: TypeAlias = Literal["float32", "float16", "bfloat16", "int32", "uint8"]

CodingName: TypeAlias = Literal["raw", "grid16", "int8", "int4", "topk"]
"""How the numbers of a hidden or gradient frame are written; `splitfl.wire.coding` has the layout of each."""

BYTES_PER_ELEMENT: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint8": 1}

MAX_PIECE = 1 << 20
"""Most bytes of a file in one message."""

LONGEST_PAUSE_S = 604_800.0
"""A week: the longest time after which an owner may say that it is worth asking again."""

REFUSAL_CODES: dict[str, str] = {
    "version": "the two sides speak different wire versions",
    "plan": "the kit was cut from another model, or at another cut, than the one served here",
    "protocol": "this protocol is not served here",
    "revoked": "this key has been taken off the allow-list",
    "unknown_session": "no such session is open for this key",
    "out_of_order": "this message is not allowed now",
    "not_disclosed": "the session's protocol does not list this message or tensor",
    "malformed": "the frames do not decode, or their sizes do not agree with the header",
    "too_large": "the request is beyond the limits of the session, or the memory of the owner's device",
    "unknown_step": "this step is not held here (any more)",
    "unknown_cache": "this cache is not held here (any more)",
    "unknown_piece": "no emulator, or no such part of one, is handed out here",
    "busy": "no room for this at present, or a rate or an hour does not allow it; later it may be possible",
    "quota": "more than this party may use of the owner; waiting does not help",
    "draining": "the owner is shutting down",
    "not_finite": "the request or its result holds NaN or infinity",
    "internal": "the owner met an error of its own",
}


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: immutable, keyword-only, unknown fields refused."""


class TensorSpec(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor frame: raw little-endian, contiguous, exactly `prod(shape) * itemsize` bytes; or coded."""

    name: TensorName
    dtype: DtypeName
    """Of the numbers; where they are coded, the session's wire dtype, which then says nothing about the bytes."""
    shape: tuple[int, ...]
    coding: CodingName = "raw"
    step: float = 0.0
    """Step of the grid, for ``grid16``."""
    kept: int = 0
    """Numbers kept of each token, for ``topk``."""


class Message(Record, frozen=True, kw_only=True):
    """What every message carries; `session` is a number the party drew, looked up only under the sender's own key."""

    session: int
    tensors: tuple[TensorSpec, ...] = ()


# ---- party to owner


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Open a session (or the same one again, after a lost link)."""

    version: int
    protocol: str
    trunk: str
    """Fingerprint of the trunk that the kit was cut from."""
    plan: str
    """Digest of the whole plan (cut, dtype, layer types)."""
    wire_dtype: DtypeName
    """Dtype of hidden and gradient frames, both ways."""
    memory: Literal["keep", "recompute"] = "keep"
    hidden_coding: CodingName = "raw"
    """How the hidden frames of the party are coded, for the whole session; replies are never coded."""
    gradient_coding: CodingName = "raw"
    """The same for its gradient frames."""


class Forward(Message, frozen=True, kw_only=True, tag="forward"):
    """Run the trunk.

    Tensors: hidden [B, T, D]; mask [B, S] uint8 if anything is padded; positions [B or 1, T] int32 if given.
    """

    step: int
    keep: bool = False
    """A `Backward` for this step will follow."""
    cache: int | None = None
    """The party's number for a KV cache held at the owner."""
    past: int = 0
    """Positions of the cache to continue from; the owner drops what lies beyond."""
    rows: tuple[int, ...] | None = None
    """Reorder the cache to these rows first (beam search)."""


class Backward(Message, frozen=True, kw_only=True, tag="backward"):
    """Gradient of the loss at the trunk's output, for a kept step. Tensors: gradient [B, T, D]."""

    step: int


class Release(Message, frozen=True, kw_only=True, tag="release"):
    """Forget caches and kept steps that are not needed any more; no reply."""

    caches: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """Send a part of the emulator that the owner hands out."""

    step: int
    """A number from the same sequence as those of forwards."""
    file: int
    """0 is ``emulator.json``; its files follow from 1 on, in its order."""
    offset: int
    length: int
    """Bytes from `offset` on; the answer holds fewer only where the file ends."""


class Bye(Message, frozen=True, kw_only=True, tag="bye"):
    """Close the session."""


# ---- owner to party


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """The session is open under these terms."""

    version: int
    max_tokens: int
    """Largest B x T of one request, and largest B x S of one cache."""
    max_length: int
    """Longest sequence, in positions."""
    memory: Literal["keep", "recompute"]
    lease_s: float
    """An idle session or cache is dropped after so many seconds."""
    server: str
    """Version of the owner's splitfl."""
    compute: DtypeName = "float32"
    """What the trunk computes in, as the owner says."""


class ForwardDone(Message, frozen=True, kw_only=True, tag="forward_done"):
    """Tensors: hidden [B, T, D], the trunk's output."""

    step: int


class BackwardDone(Message, frozen=True, kw_only=True, tag="backward_done"):
    """Tensors: gradient [B, T, D], of the loss at the trunk's input."""

    step: int


class Piece(Message, frozen=True, kw_only=True, tag="piece"):
    """Tensors: piece [N] uint8, the bytes that were asked for."""

    step: int
    file: int
    offset: int
    total: int
    """Bytes of the whole file."""


class Refused(Message, frozen=True, kw_only=True, omit_defaults=True, tag="refused"):
    """No, with a code from `REFUSAL_CODES`, a sentence and what to do next."""

    code: str
    problem: str
    expected: str | None = None
    hint: str | None = None
    step: int | None = None
    retry_after_s: float | None = None
    """With ``busy``: seconds after which it is worth asking again."""


class Closed(Message, frozen=True, kw_only=True, tag="closed"):
    """The session is closed, at the party's wish or because the owner stops."""


FromParty: TypeAlias = Hello | Forward | Backward | Release | Fetch | Bye
FromOwner: TypeAlias = Welcome | ForwardDone | BackwardDone | Piece | Refused | Closed
AnyMessage: TypeAlias = FromParty | FromOwner


def kind(message: AnyMessage) -> str:
    """The wire tag of `message`, for instance ``"forward"``."""
    return str(type(message).__struct_config__.tag)
