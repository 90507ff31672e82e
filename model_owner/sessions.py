"""What the owner holds for each session: the conversation, kept steps, KV caches, the last replies, and their lease."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from transformers import Cache

from model_owner.memory import MemoryBudget
from model_owner.trunk import Kept
from splitfl.wire.codecs import Frame
from splitfl.wire.frames import Limits
from splitfl.wire.session import OwnerSession

SessionKey: TypeAlias = tuple[str, int]
"""The party's public key and the number it drew: a number alone, or a routing id, finds nothing."""
Request: TypeAlias = tuple[str, int]
"""Kind and step."""

_REPLIES_REMEMBERED = 4  # a party resends what is unanswered, and it has few requests under way


@dataclass
class HeldCache:
    """A KV cache and the bytes reserved for it."""

    cache: Cache
    reserved: int = 0


@dataclass
class HeldSession:
    """Everything of one session."""

    key: SessionKey
    party: str
    """Name on the allow-list."""
    talk: OwnerSession
    limits: Limits
    recompute: bool
    route: bytes
    budget: MemoryBudget
    last_heard: float = field(default_factory=time.monotonic)
    kept: dict[int, tuple[Kept, int]] = field(default_factory=dict)
    caches: dict[int, HeldCache] = field(default_factory=dict)
    under_way: set[Request] = field(default_factory=set)
    replies: OrderedDict[Request, list[Frame]] = field(default_factory=OrderedDict)
    served_tokens: int = 0
    cache_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a cache is in use: requests on caches of one session do not overlap."""

    def keep(self, step: int, kept: Kept, reserved: int) -> None:
        """Hold a step for its backward."""
        self.drop_step(step)
        self.kept[step] = (kept, reserved)

    def drop_step(self, step: int) -> None:
        """Forget a kept step and return its bytes."""
        held = self.kept.pop(step, None)
        if held is not None:
            self.budget.give_back(held[1])

    def drop_cache(self, number: int) -> None:
        """Forget a cache and return its bytes."""
        held = self.caches.pop(number, None)
        if held is not None:
            self.budget.give_back(held.reserved)

    def drop_all(self) -> None:
        """Forget everything held."""
        for step in list(self.kept):
            self.drop_step(step)
        for number in list(self.caches):
            self.drop_cache(number)
        self.replies.clear()

    def remember(self, request: Request, frames: list[Frame]) -> None:
        """Keep a reply for a party that did not get it: the same request gets the same bytes."""
        self.replies[request] = frames
        while len(self.replies) > _REPLIES_REMEMBERED:
            self.replies.popitem(last=False)


class SessionTable:
    """All open sessions, found under the sender's own key alone."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._sessions: dict[SessionKey, HeldSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[HeldSession]:
        return iter(list(self._sessions.values()))

    def find(self, key: SessionKey) -> HeldSession | None:
        """The session of this sender and number."""
        return self._sessions.get(key)

    def add(self, session: HeldSession) -> None:
        """Enter a new session."""
        self._sessions[session.key] = session

    def remove(self, session: HeldSession) -> None:
        """Close a session and return what it held."""
        self._sessions.pop(session.key, None)
        session.drop_all()

    def expired(self) -> list[HeldSession]:
        """Sessions whose party has been silent for longer than the lease, with nothing under way."""
        oldest = time.monotonic() - self.lease_s
        return [s for s in self._sessions.values() if s.last_heard < oldest and not s.under_way]
