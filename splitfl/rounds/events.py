"""What may happen to a federation: the events that `splitfl.rounds.machine` knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from splitfl.rounds.records import Scores


@dataclass(frozen=True, kw_only=True)
class Enters:
    """A party is there, perhaps again and as a new process."""

    party: str
    session: int
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Begins:
    """The coordinator begins an attempt with these parties."""

    parties: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class IsReady:
    """A party has its update for the round."""

    party: str
    session: int
    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Hands:
    """A blob of a stage is here, whole and with this digest."""

    party: str
    session: int
    round: int
    attempt: int
    stage: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Summed:
    """The sum was opened, or is as open as the coordinator may have it."""

    digest: str


@dataclass(frozen=True, kw_only=True)
class Fails:
    """The attempt cannot go on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Reports:
    """A party has computed the next state."""

    party: str
    session: int
    round: int
    attempt: int
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The blob of a state is here: the agreed one, or one that is proposed."""

    digest: str


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """A party goes: out of this attempt, or altogether."""

    party: str
    session: int
    why: str
    only_attempt: bool


@dataclass(frozen=True, kw_only=True)
class Late:
    """The deadline of the phase has passed."""


Event: TypeAlias = Enters | Begins | IsReady | Hands | Summed | Fails | Reports | Stored | Leaves | Late
