"""What the server tells whoever watches it: metrics, durable state, tests. The default listens to nothing.

An observer is told plain facts, never a frame, a tensor or a key. It is called from the thread that owns the sockets
(`work_done` and `batch_done` from a worker), so it must return at once and must not raise: what is slow goes into a
queue of its own. Whoever adds a message here adds it to `NoObserver` and `Observers` as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

log = logging.getLogger("splitfl.owner")

Work: TypeAlias = Literal["forward", "backward", "decode", "fetch"]
"""What a request was; decode is a forward that goes on from a cache."""
Ended: TypeAlias = Literal["closed", "expired", "revoked", "gave way", "stopped", "lost"]
"""Why a session ended; `lost` is only ever written afterwards, for an owner that was killed."""


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    """Who opened a session, and under which terms."""

    name: str
    """Drawn by the owner, for logs and records: a party's number may come twice, and a key does not belong there."""
    party: str
    """Name on the allow-list."""
    fingerprint: str
    """Of the party's public key."""
    protocol: str
    wire_dtype: str


@dataclass(frozen=True, kw_only=True)
class Served:
    """One request that was answered."""

    session: str
    party: str
    work: Work
    tokens: int
    """Rows times new positions; 0 for `fetch`."""
    bytes_in: int
    bytes_out: int
    seconds: float
    """From its arrival to its answer."""


class Observer(Protocol):
    """Is told what happens."""

    def session_opened(self, facts: SessionFacts) -> None:
        """A session is open. Once a session."""

    def session_ended(self, facts: SessionFacts, why: Ended, seconds: float) -> None:
        """It is over, after so many seconds. Once a session."""

    def request_served(self, served: Served) -> None:
        """A request was answered."""

    def refused(self, code: str, session: str | None) -> None:
        """Something was refused, with one of `REFUSAL_CODES`; in a session, or in none."""

    def work_done(self, waited_s: float, took_s: float) -> None:
        """A worker has done one piece of work, which waited so long for it. From a worker."""

    def batch_done(self, requests: int, rows: int, tokens: int) -> None:
        """So many requests were computed in one pass of the trunk. From a worker."""


class NoObserver:
    """Listens to nothing."""

    def session_opened(self, facts: SessionFacts) -> None:
        """Nothing."""

    def session_ended(self, facts: SessionFacts, why: Ended, seconds: float) -> None:
        """Nothing."""

    def request_served(self, served: Served) -> None:
        """Nothing."""

    def refused(self, code: str, session: str | None) -> None:
        """Nothing."""

    def work_done(self, waited_s: float, took_s: float) -> None:
        """Nothing."""

    def batch_done(self, requests: int, rows: int, tokens: int) -> None:
        """Nothing."""


class Observers:
    """Tells several. One that raises is logged and does not keep the others, or the server, from going on."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers = tuple(observers)

    def session_opened(self, facts: SessionFacts) -> None:
        """Tell all."""
        self._tell(lambda one: one.session_opened(facts))

    def session_ended(self, facts: SessionFacts, why: Ended, seconds: float) -> None:
        """Tell all."""
        self._tell(lambda one: one.session_ended(facts, why, seconds))

    def request_served(self, served: Served) -> None:
        """Tell all."""
        self._tell(lambda one: one.request_served(served))

    def refused(self, code: str, session: str | None) -> None:
        """Tell all."""
        self._tell(lambda one: one.refused(code, session))

    def work_done(self, waited_s: float, took_s: float) -> None:
        """Tell all."""
        self._tell(lambda one: one.work_done(waited_s, took_s))

    def batch_done(self, requests: int, rows: int, tokens: int) -> None:
        """Tell all."""
        self._tell(lambda one: one.batch_done(requests, rows, tokens))

    def _tell(self, news: Callable[[Observer], None]) -> None:
        for one in self.observers:
            try:
                news(one)
            except Exception:
                log.exception("an observer failed")


class Account(Protocol):
    """Tokens that each party has used up in all, over all runs of the owner: what a query budget is compared with.

    `charge` every request; then, before the answer leaves, `await secured(party)`: no answer leaves whose tokens a
    crash could forget. Only a party that has a budget needs the second step. Without one its charges are on the disk
    soon after, and count if it is given a budget later.
    """

    def spent_tokens(self, party: str) -> int:
        """Tokens charged to the party of this name so far, those not yet durable included."""

    def spent_of_all(self) -> dict[str, int]:
        """The same of every party that was ever charged; may be asked from any thread."""

    def charge(self, party: str, tokens: int) -> None:
        """Charge tokens; counts at once, returns at once. Fewer than none gives back."""

    async def secured(self, party: str) -> None:
        """Return once everything charged to `party` so far is durable.

        Raises:
            Refusal: it could not be written in time (code ``busy``); the answer must not leave.
        """


class PassingAccount:
    """An account that is forgotten when the owner stops: the default, without `--state`."""

    def __init__(self) -> None:
        self._spent: dict[str, int] = {}

    def spent_tokens(self, party: str) -> int:
        """Tokens charged since the start."""
        return self._spent.get(party, 0)

    def spent_of_all(self) -> dict[str, int]:
        """The same of every party."""
        return dict(self._spent)

    def charge(self, party: str, tokens: int) -> None:
        """Charge tokens."""
        self._spent[party] = self._spent.get(party, 0) + tokens

    async def secured(self, party: str) -> None:
        """At once: nothing is ever durable."""
