"""What a coordinator knows about a federation at one moment, as records that can be written down whole.

All of it is in `Standing`. `splitfl.rounds.machine` turns one standing and one event into the next; whoever writes each
standing to disk before anybody is told about it can be killed at any moment.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from splitfl.aggregation.sums import Stage
from splitfl.errors import UsageError

Phase: TypeAlias = Literal[
    "gathering", "training", "advertise", "share", "submit", "agree", "reveal", "summing", "proposing", "settling",
    "storing", "finished",
]  # fmt: skip
PHASES: tuple[Phase, ...] = (
    "gathering", "training", "advertise", "share", "submit", "agree", "reveal", "summing", "proposing", "settling",
    "storing", "finished",
)  # fmt: skip


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: immutable, keyword-only."""


class Course(Record, frozen=True, kw_only=True):
    """What the operator has chosen; the same for the whole federation."""

    rounds: int
    min_parties: int
    stages: tuple[Stage, ...]
    attempts: int = 5
    """How often one round may be begun."""
    judge: Literal["common", "personal"] = "common"
    """Which score decides what the best round is."""
    collapse: float = 0.5
    """A fall below the best score by this part of it is one strike."""
    patience: int = 2
    """So many strikes in a row are a collapse."""
    on_collapse: Literal["rollback", "stop"] = "rollback"
    proposed: bool = False
    """One party proposes the next state, and the others compare it with their own: for rules whose last bits depend on
    a machine's libraries. Otherwise each computes it, and all have the same bytes."""

    def check(self) -> Course:
        """Itself.

        Raises:
            UsageError: numbers that make no federation.
        """
        if min(self.rounds, self.min_parties, self.attempts, self.patience) < 1 or self.collapse <= 0:
            raise UsageError("Rounds, parties, attempts, patience and collapse must be above 0.")
        if "submit" not in self.stages:
            raise UsageError("A round without the stage submit sums nothing.")
        return self


class Scores(Record, frozen=True, kw_only=True):
    """What one party reports at the end of a round. Scores are of held-out rows, and higher is better."""

    state: str
    personal: float | None = None
    common: float | None = None
    rows: int = 0


class Member(Record, frozen=True, kw_only=True):
    """One party of the attempt under way."""

    session: int
    ready: bool = False
    items: dict[str, str] = {}
    """Stage to the digest of what was acknowledged for it."""
    out: str = ""
    """Why it is not in this attempt any more."""
    scores: Scores | None = None


class Present(Record, frozen=True, kw_only=True):
    """A party that has entered."""

    session: int
    rows: int = 0
    expected: bool = True
    """Whether a round waits for it; one that missed a deadline is not waited for until it is heard again."""


class Best(Record, frozen=True, kw_only=True):
    """The round with the best validation score so far."""

    round: int
    score: float
    state: str


class Ended(Record, frozen=True, kw_only=True):
    """How one round ended."""

    round: int
    kept: bool
    reason: str
    attempts: int
    state: str | None
    """The state after it, whatever became of the round."""
    summed: tuple[str, ...]
    """Whose updates are in the sum, by public key."""
    scores: dict[str, Scores]
    personal: float | None = None
    common: float | None = None
    """Means over the held-out rows of those who reported."""
    rolled_back: bool = False


class Standing(Record, frozen=True, kw_only=True):
    """A federation at one moment."""

    federation: str
    round: int = 0
    attempt: int = 0
    phase: Phase = "gathering"
    present: dict[str, Present] = {}
    members: dict[str, Member] = {}
    """Of the attempt under way, by public key."""
    parties: tuple[str, ...] = ()
    """Those who may take part in the sum, sorted; fixed when the first stage begins."""
    shown: dict[str, str] = {}
    """What the parties may fetch in this attempt: item (``shares/KEY`` for one party's shares) to digest."""
    state: str | None = None
    """Digest of the state that the round starts from; None is the start that all know."""
    agreed: str | None = None
    """Digest of the next state, while it is being handed over."""
    asked: tuple[str, ...] = ()
    """Whom a state was asked from, the last one now."""
    failures: tuple[str, ...] = ()
    """Why earlier attempts of this round ended."""
    best: Best | None = None
    strikes: int = 0
    rollbacks: int = 0
    last: Ended | None = None
    """The round that ended last."""
    reason: str = ""
    """Why the federation is finished."""

    def inside(self) -> list[str]:
        """Members that are still in the attempt, sorted."""
        return sorted(party for party, member in self.members.items() if not member.out)

    def survivors(self) -> tuple[str, ...]:
        """Whose updates were acknowledged in this attempt, sorted."""
        return tuple(sorted(party for party, member in self.members.items() if "submit" in member.items))

    def needed(self) -> set[str]:
        """Digests of every blob that may still be asked for."""
        held = {digest for member in self.members.values() for digest in member.items.values()}
        held |= set(self.shown.values())
        held |= {digest for digest in (self.state, self.agreed) if digest}
        return held | ({self.best.state} if self.best is not None else set())
