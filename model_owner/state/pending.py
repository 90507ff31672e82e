"""What happened since the last write, added up: it grows with sessions and parties, never with requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from model_owner.observer import Ended, Served, SessionFacts
from model_owner.state.schema import COUNTED


def new_sums() -> dict[str, float]:
    """Zero for everything that is counted."""
    return dict.fromkeys(COUNTED, 0)


def day_of(moment: float) -> str:
    """The day in UTC, ``YYYY-MM-DD``."""
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


@dataclass
class Running:
    """An open session, and up to when its seconds are booked."""

    facts: SessionFacts
    booked: float


@dataclass
class Pending:
    """One batch: written in one transaction, or not at all."""

    opened: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows of new sessions, by name."""
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    """What sessions did, by name; ``seconds`` among it."""
    ended: dict[str, tuple[float, Ended]] = field(default_factory=dict)
    usage: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    """By party and day."""
    seen: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """Fingerprint and party; first and last time."""
    charges: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.opened or self.sums or self.ended or self.usage or self.seen or self.charges)

    def open(self, facts: SessionFacts, server: str, now: float) -> None:
        """A session began."""
        self.opened[facts.name] = {
            "name": facts.name, "server": server, "party": facts.party, "fingerprint": facts.fingerprint,
            "protocol": facts.protocol, "wire_dtype": facts.wire_dtype, "opened": now,
        }  # fmt: skip
        self._see(facts, now)
        self._day(facts.party, now)["sessions"] += 1

    def serve(self, served: Served, now: float) -> None:
        """A request was answered."""
        for sums in (self._session(served.session), self._day(served.party, now)):
            sums["requests"] += 1
            sums["bytes_in"] += served.bytes_in
            sums["bytes_out"] += served.bytes_out
            if served.work != "fetch":
                sums[f"tokens_{served.work}"] += served.tokens
            sums["steps"] += served.work == "backward"

    def book(self, running: Running, now: float) -> None:
        """Seconds of an open session, since they were booked last."""
        seconds, running.booked = max(now - running.booked, 0.0), now
        self._session(running.facts.name)["seconds"] += seconds
        self._day(running.facts.party, now)["session_seconds"] += seconds
        self._see(running.facts, now)

    def charge(self, party: str, tokens: int) -> None:
        """Tokens against a budget."""
        self.charges[party] = self.charges.get(party, 0) + tokens

    def _see(self, facts: SessionFacts, now: float) -> None:
        who = facts.fingerprint, facts.party
        self.seen[who] = self.seen.get(who, (now, now))[0], now

    def _session(self, name: str) -> dict[str, float]:
        return self.sums.setdefault(name, new_sums() | {"seconds": 0.0})

    def _day(self, party: str, now: float) -> dict[str, float]:
        return self.usage.setdefault((party, day_of(now)), new_sums() | {"sessions": 0, "session_seconds": 0.0})
