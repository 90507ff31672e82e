"""What the owner holds for each session: the conversation, kept steps, KV caches, the last replies, and their lease."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from transformers import Cache

from model_owner.memory import MemoryBudget, Share
from model_owner.observer import Served, SessionFacts, Work
from model_owner.trunk import Kept
from splitfl.link import decoded
from splitfl.wire.channel import INSECURE_SENDER
from splitfl.wire.codecs import Frame, nbytes
from splitfl.wire.frames import Limits
from splitfl.wire.keys import fingerprint
from splitfl.wire.messages import BYTES_PER_ELEMENT, Backward, Fetch, Forward
from splitfl.wire.session import OwnerSession

SessionKey: TypeAlias = tuple[str, int]
"""The party's public key and the number it drew: a number alone, or a routing id, finds nothing."""
Request: TypeAlias = tuple[str, int]
"""Kind and step."""

_ROUTES_REMEMBERED = 4  # what waited in a link that broke may be read after what the party said on its next one
_REPLIES_REMEMBERED = 4  # a party resends what is unanswered, and it has few requests under way


@dataclass
class HeldCache:
    """A KV cache, the bytes reserved for it, and its extent once the requests so far are done."""

    cache: Cache
    reserved: int = 0
    rows: int = 0
    length: int = 0
    used: float = field(default_factory=time.monotonic)
    """When it was used last."""
    steps: deque[int] = field(default_factory=lambda: deque(maxlen=2 * _REPLIES_REMEMBERED))
    """The last ones that went into it."""


@dataclass
class HeldSession:
    """Everything of one session."""

    key: SessionKey
    party: str
    """Name on the allow-list."""
    talk: OwnerSession
    limits: Limits
    recompute: bool
    routes: list[bytes]
    """Where the party was heard, the latest last: its answer goes there, or to an earlier one if that link is gone."""
    budget: Share
    """Shared by all sessions of one party."""
    last_heard: float = field(default_factory=time.monotonic)
    kept: dict[int, tuple[Kept, int]] = field(default_factory=dict)
    caches: dict[int, HeldCache] = field(default_factory=dict)
    under_way: dict[Request, float] = field(default_factory=dict)
    """Requests that have no answer yet, and when the party asked last."""
    replies: OrderedDict[Request, list[Frame]] = field(default_factory=OrderedDict)
    served_tokens: int = 0
    handed_out: int = 0
    """Bytes of the emulator."""
    cache_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a cache is in use: requests on caches of one session do not overlap."""

    name: str = field(default_factory=lambda: secrets.token_hex(6))
    """For logs and records."""
    opened: float = field(default_factory=time.monotonic)

    @property
    def payer(self) -> Hashable:
        """Whose turn its work takes: all sessions of a key have one share. Where nobody has a key, each has its own."""
        return self.key if self.key[0] == INSECURE_SENDER else self.key[0]

    @property
    def facts(self) -> SessionFacts:
        """What an observer is told about it."""
        sender, terms = self.key[0], self.talk.terms
        shown = sender if sender == INSECURE_SENDER else fingerprint(sender.encode())
        return SessionFacts(
            name=self.name, party=self.party, fingerprint=shown, protocol=terms.protocol, wire_dtype=terms.wire_dtype
        )

    def told(self, message: Forward | Backward | Fetch, size: int, frames: Sequence[Frame], seconds: float) -> Served:
        """What an observer is told of an answer.

        Args:
            message: the request.
            size: its bytes; what it asks for, if it is a `Fetch`.
            frames: of the answer.
            seconds: from the one to the other.
        """
        work: Work = "fetch" if isinstance(message, Fetch) else "backward"
        if isinstance(message, Forward):
            work = "decode" if message.past else "forward"
        rows, new = (0, 0) if isinstance(message, Fetch) else message.tensors[0].shape[:2]
        return Served(
            session=self.name,
            party=self.party,
            work=work,
            tokens=rows * new,
            bytes_in=0 if isinstance(message, Fetch) else size,
            bytes_out=sum(map(nbytes, frames)),
            seconds=seconds,
        )

    def heard(self, route: bytes) -> None:
        """Note that the party is there, and where."""
        self.last_heard = time.monotonic()
        self.routes = [*(known for known in self.routes if known != route), route][-_ROUTES_REMEMBERED:]

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing is under way, and nothing was heard or answered for so long."""
        return not self.under_way and self.last_heard < time.monotonic() - seconds

    def keep(self, step: int, kept: Kept, reserved: int) -> None:
        """Hold a step for its backward."""
        self.drop_step(step)
        self.kept[step] = (kept, reserved)

    def drop_step(self, step: int) -> None:
        """Forget a kept step and return its bytes."""
        held = self.kept.pop(step, None)
        if held is not None:
            self.budget.give_back(held[1])

    def spend_step(self, step: int) -> None:
        """A backward through `step` failed and may have used its graph up: hold only what makes a new one."""
        if step in self.kept:
            kept, reserved = self.kept[step]
            needed = min(decoded(kept.request.hidden).nbytes, reserved)
            self.kept[step] = (replace(kept, entry=None, output=None), needed)
            self.budget.give_back(reserved - needed)

    def drop_cache(self, number: int) -> None:
        """Forget a cache and return its bytes."""
        held = self.caches.pop(number, None)
        if held is not None:
            self.budget.give_back(held.reserved)
            for step in held.steps:  # said again, they shall fill a new one, not be answered from memory
                self.replies.pop(("forward", step), None)

    def touch_cache(self, number: int) -> None:
        """Its lease begins anew."""
        if number in self.caches:
            self.caches[number].used = time.monotonic()

    def drop_idle_caches(self, seconds: float) -> int:
        """Forget caches that nobody has used for so long, unless one is in use; how many."""
        if self.cache_turn.locked():
            return 0
        idle = [number for number, one in self.caches.items() if one.used < time.monotonic() - seconds]
        for number in idle:
            self.drop_cache(number)
        return len(idle)

    def drop_all(self) -> None:
        """Forget everything held."""
        for step in list(self.kept):
            self.drop_step(step)
        for number in list(self.caches):
            self.drop_cache(number)
        self.replies.clear()

    def remember(self, request: Request, frames: list[Frame]) -> None:
        """Keep a reply for a party that did not get it: the same request gets the same bytes.

        The last reply is always kept, earlier ones while all together are no more than one message may be.
        """
        self.replies[request] = frames
        self.replies.move_to_end(request)
        most = self.limits.max_tokens * self.limits.width * BYTES_PER_ELEMENT[self.limits.wire_dtype]
        while len(self.replies) > _REPLIES_REMEMBERED or (len(self.replies) > 1 and self._reply_bytes() > most):
            self.replies.popitem(last=False)

    def _reply_bytes(self) -> int:
        return sum(nbytes(frame) for frames in self.replies.values() for frame in frames[1:])


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

    def of_party(self, sender: str) -> list[HeldSession]:
        """All sessions under this key."""
        return [session for session in self._sessions.values() if session.key[0] == sender]

    def share(self, sender: str, budget: MemoryBudget) -> Share:
        """This party's part of the budget, the same for all its sessions."""
        return next((session.budget for session in self.of_party(sender)), None) or Share(budget)

    def add(self, session: HeldSession) -> None:
        """Enter a new session."""
        self._sessions[session.key] = session

    def remove(self, session: HeldSession) -> None:
        """Close a session and return what it held."""
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
        session.drop_all()

    def expired(self) -> list[HeldSession]:
        """Sessions whose party has been silent for longer than the lease, with nothing under way."""
        return [session for session in self._sessions.values() if session.silent_for(self.lease_s)]
