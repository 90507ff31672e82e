"""Every message of a federation's rounds, as a typed record in one tagged union a direction.

A party asks, the coordinator answers: each message of a party has exactly one answer, which repeats its `request`
number. At most one raw frame travels behind a header, and only with `Put` and `Piece`. Vectors, masks and ciphertexts
are opaque here: bytes of a known length with a known digest.

These messages have a socket of their own and share nothing with those of a tuning session, so that a coordinator can be
a machine that never sees a trunk. Field rules are those of `splitfl.wire.messages`; a change that breaks them raises
`ROUNDS_VERSION`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

ROUNDS_VERSION = 1

SumName: TypeAlias = Literal["plain", "mask", "mask+hidden", "bfv", "ckks"]
PutItem: TypeAlias = Literal["advertise", "share", "submit", "agree", "reveal", "state"]
"""What a party hands over: a blob of each stage, and the state that all have agreed on if it was asked for it."""
GetItem: TypeAlias = Literal["adverts", "shares", "survivors", "agreements", "result", "proposal", "state"]
TaskName: TypeAlias = Literal[
    "wait", "train", "advertise", "share", "submit", "agree", "reveal", "settle", "propose", "store"
]

ROUND_REFUSALS: dict[str, str] = {
    "version": "the two sides speak different versions of these messages",
    "facts": "this party's layout, model, rule or sum is not that of the federation",
    "revoked": "this key has been taken off the allow-list",
    "unknown_session": "no such session is entered for this key",
    "malformed": "the frames do not decode, or their sizes do not agree with the header",
    "too_large": "more bytes are announced than this item can have in this round",
    "not_in_round": "this party is not, or no longer, part of this attempt",
    "late": "this round, attempt or stage is not the one under way",
    "conflict": "other bytes were acknowledged for this item already",
    "mismatch": "the bytes do not have the digest that was announced",
    "rejected": "the update cannot be part of the sum",
    "unknown_item": "this item is not held here",
    "busy": "too many requests of this party wait for their answer",
    "internal": "the coordinator met an error of its own",
}


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: immutable, keyword-only, unknown fields refused."""


class Facts(Record, frozen=True, kw_only=True):
    """What must be the same at every party, or a sum of their vectors would mean nothing."""

    layout: str
    """Digest of which value belongs where in the adapter."""
    base: str
    """Digest of what is tuned: the plan and the trunk's fingerprint."""
    rule: str
    """Name of the aggregation rule."""
    sum: SumName
    stages: tuple[str, ...]
    """Stages that this way of summing walks through, in order."""
    lengths: tuple[int, ...]
    """Values in one update, round by round; after the last one it begins again. Alternating rules have two."""


class Message(Record, frozen=True, kw_only=True):
    """What every message carries: the party's number of its process, and of this request."""

    session: int
    request: int


# ---- party to coordinator


class Enter(Message, frozen=True, kw_only=True, tag="enter"):
    """Take part from the next round on; or again, after a lost link."""

    version: int
    facts: Facts
    rows: int = 0
    """Training rows, for display only; 0 where it is not said."""


class Ask(Message, frozen=True, kw_only=True, tag="ask"):
    """What is there to be done? The answer may take `wait_s` seconds if there is nothing."""

    wait_s: float = 0.0


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """This party has an update for the round."""

    round: int
    attempt: int


class Put(Message, frozen=True, kw_only=True, tag="put"):
    """A piece of a blob. One frame: its bytes from `offset` on."""

    round: int
    attempt: int
    item: PutItem
    offset: int
    total: int
    digest: str
    """BLAKE2b-256 of the whole blob, 64 hexadecimal digits."""


class Get(Message, frozen=True, kw_only=True, tag="get"):
    """A piece of a blob of the round, or of a state."""

    round: int
    attempt: int
    item: GetItem
    offset: int
    size: int
    """Longest piece that is wanted."""
    digest: str = ""
    """Of the state that is wanted; empty for any other item."""


class Report(Message, frozen=True, kw_only=True, tag="report"):
    """What the round gave at this party. Scores are of held-out rows, and higher is better."""

    round: int
    attempt: int
    state: str
    """Digest of the state that the next round would start from."""
    personal: float | None = None
    """Score of this party's own model."""
    common: float | None = None
    """Score of the model that all share."""
    rows: int = 0
    """Held-out rows behind the scores; their weight in the mean."""


class Leave(Message, frozen=True, kw_only=True, tag="leave"):
    """Not in this attempt, if `round` and `attempt` are given; otherwise not any more."""

    round: int | None = None
    attempt: int | None = None
    why: str = ""


FromParty: TypeAlias = Enter | Ask | Ready | Put | Get | Report | Leave


# ---- coordinator to party


class Entered(Message, frozen=True, kw_only=True, tag="entered"):
    """The terms of this federation."""

    version: int
    federation: str
    """Its identity, 32 hexadecimal digits."""
    rounds: int
    min_parties: int
    clip: float
    max_weight: float
    piece_bytes: int
    """Largest frame of a put or a piece."""


class Task(Message, frozen=True, kw_only=True, tag="task"):
    """What this party is to do now."""

    task: TaskName
    round: int
    attempt: int
    left_s: float
    """Seconds until the deadline of the stage."""
    parties: tuple[str, ...] = ()
    """Public keys of those who may take part in this attempt, sorted; empty while they train."""
    state: str = ""
    """Digest of the state that this round starts from; empty for the common start."""
    kept: bool = True
    """Whether the round before this one was kept."""
    reason: str = ""
    """Why it was not, or what else is to be known about it."""
    proposal: bool = False
    """Whether another party's next state is there to be compared with one's own."""


class Got(Message, frozen=True, kw_only=True, tag="got"):
    """Everything below `next` is here. `done`: the whole is on disk, and will not be asked for again."""

    next: int = 0
    done: bool = False


class Piece(Message, frozen=True, kw_only=True, tag="piece"):
    """A piece of a blob. One frame: its bytes from `offset` on."""

    offset: int
    total: int
    digest: str


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """No round comes any more."""

    rounds: int
    reason: str
    kept: bool = True
    """Whether the last round was kept."""
    state: str = ""
    """Digest of the last state."""
    best_round: int | None = None
    best_state: str = ""
    """Digest of the state with the best validation score."""


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """No, with a code from `ROUND_REFUSALS`, a sentence and what to do next."""

    code: str
    problem: str
    expected: str | None = None
    hint: str | None = None


FromCoordinator: TypeAlias = Entered | Task | Got | Piece | Finished | Refused
AnyRoundMessage: TypeAlias = FromParty | FromCoordinator


def kind(message: AnyRoundMessage) -> str:
    """The wire tag of `message`, for instance ``"put"``."""
    return kind_of(type(message))


def kind_of(message: type[AnyRoundMessage]) -> str:
    """The wire tag of a kind of message."""
    return str(message.__struct_config__.tag)
