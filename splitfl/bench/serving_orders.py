"""What `splitfl bench serving` asks of the processes that play parties, and what they answer: one JSON line each."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from splitfl.bench.orders import Line

Work: TypeAlias = Literal["train", "decode"]
PROMPT, TURN = 32, 64  # positions of a prompt, and new ones until a decoding party goes back to it


class LoadStart(Line, frozen=True, kw_only=True):
    """How a process is started: the first argument of its command line."""

    kit: str
    owner_key: str
    keys: tuple[str, ...]
    """Secret key files, one a party that it plays."""


class Open(Line, frozen=True, kw_only=True, tag="open"):
    """Open a session for each of the first `parties` keys, and do one step in each."""

    owner: str
    parties: int
    work: Work
    rows: int
    length: int
    """Of a training row."""
    memory: Literal["keep", "recompute"]


class Go(Line, frozen=True, kw_only=True, tag="go"):
    """All loops ask as fast as they are answered until `end`; what ends from `begin` on counts. Monotonic clock."""

    begin: float
    end: float


class Leave(Line, frozen=True, kw_only=True, tag="leave"):
    """Close the sessions."""


LoadOrder: TypeAlias = Open | Go | Leave


class Done(Line, frozen=True, kw_only=True):
    """It is done."""

    problem: str | None = None


class Loaded(Line, frozen=True, kw_only=True):
    """What each party had of the time that counts."""

    latencies: tuple[tuple[float, ...], ...] = ()
    """Seconds of each step that ended in it, party by party."""
    problem: str | None = None


LOAD_DECODER = msgspec.json.Decoder(LoadOrder)
