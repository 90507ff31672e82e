"""Who is there at this moment, how long a phase has lasted, and with whom a round begins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from model_owner.rounds.engine import Engine
from model_owner.rounds.vault import Upload
from splitfl.rounds.records import Standing
from splitfl.wire.keys import AllowList
from splitfl.wire.round_messages import Ask

_HEARD_S = 5.0  # a party that spoke so lately is there, though it does not wait for an answer right now


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the coordinator waits, in seconds."""

    deadline: float = 600.0
    """For the parties to train, and to evaluate at the end of a round."""
    stage_deadline: float = 60.0
    """For each stage of the sum."""
    wait: float = 30.0
    """For further parties, once there are enough to begin."""
    farewell: float = 30.0
    """At the end, for parties to hear that it is over and to fetch the best state."""


@dataclass
class Contact:
    """What is known about a party's link at this moment; nothing of it has to survive a restart."""

    heard: float = 0.0
    waiting: int = 0
    """Its requests that wait for their turn."""
    parked: tuple[bytes, Ask, float] | None = None
    """Route, question and latest time of an answer."""
    upload: tuple[tuple[object, ...], Upload] | None = None
    handing: dict[tuple[object, ...], asyncio.Future[None]] = field(default_factory=dict)
    """Blobs that are complete and being dealt with."""


class Room:
    """The parties as they are seen now.

    Args:
        engine: knows the standing.
        allow: who may take part.
        patience: the time limits.
    """

    def __init__(self, engine: Engine, allow: AllowList, patience: Patience) -> None:
        self.engine, self.allow, self.patience = engine, allow, patience
        self.contacts: dict[str, Contact] = {}
        self._place: tuple[object, ...] = ()
        self._since = self._enough_since = 0.0
        self._is_first = True

    def heard(self, party: str) -> Contact:
        """A party has said something."""
        contact = self.contacts.setdefault(party, Contact())
        contact.heard = time.monotonic()
        return contact

    def look(self) -> None:
        """Begin to count anew if the federation is at another place than at the last look."""
        place = place_of(self.engine.standing)
        if place != self._place:
            self._place, self._since, self._enough_since = place, time.monotonic(), 0.0

    @property
    def seconds_left(self) -> float:
        """Until the deadline of the phase; below 0 after it."""
        phase = self.engine.standing.phase
        limit = self.patience.deadline if phase in ("training", "settling") else self.patience.stage_deadline
        if phase == "finished":
            limit = self.patience.farewell
        return limit - (time.monotonic() - self._since)

    def is_over(self) -> bool:
        """Whether the deadline has passed, of the place where the federation is now."""
        return place_of(self.engine.standing) == self._place and self.seconds_left < 0

    def everybody_knows(self) -> bool:
        """Whether no party is left that has to hear that the federation is finished."""
        return not any(present.expected for present in self.engine.standing.present.values())

    def who_begins(self) -> Sequence[str]:
        """Everybody who is there, if that is enough; before `Patience.wait` only if nobody else is expected."""
        standing, now = self.engine.standing, time.monotonic()
        here = {party for party, contact in self.contacts.items() if self._is_here(party, contact, now)}
        if len(here) < self.engine.course.min_parties:
            self._enough_since = 0.0
            return ()
        self._enough_since = self._enough_since or now
        expected = {party for party, present in standing.present.items() if present.expected}
        everybody = not expected - here
        if self._is_first and standing.last is None:  # who has never been heard of may still come
            everybody = everybody and len(here) >= len(self.allow.names())
        if not everybody and now - self._enough_since < self.patience.wait:
            return ()
        self._is_first = False
        return sorted(here)

    def _is_here(self, party: str, contact: Contact, now: float) -> bool:
        present = self.engine.standing.present.get(party)
        if present is None or self.allow.allowed(party.encode()) is None:
            return False
        return contact.parked is not None or now - contact.heard < _HEARD_S


def place_of(standing: Standing) -> tuple[object, ...]:
    """What a deadline counts for."""
    return standing.round, standing.attempt, standing.phase, standing.asked
