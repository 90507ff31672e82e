"""What `splitfl bench rounds` says to a process with parties (`party/rounds_side.py`), and its answers: JSON lines."""

from __future__ import annotations

from splitfl.bench.orders import Line
from splitfl.wire.round_messages import SumName


class PartiesStart(Line, frozen=True, kw_only=True):
    """First argument of the process: who its parties are and what they do."""

    address: str
    coordinator_key: str
    keys: tuple[str, ...]
    """Secret key files, one for each party of this process."""
    places: tuple[int, ...]
    """Of these parties among all; from 0."""
    parties: int
    """Of the federation."""
    peers: str
    """Folder of all parties' public keys."""
    folder: str
    sum: SumName
    values: int


class PartiesReady(Line, frozen=True, kw_only=True):
    """Everything is imported; the parties have not connected yet."""


class RoundsOver(Line, frozen=True, kw_only=True):
    """All rounds of all parties of this process are over."""

    rounds: int
    """Of the party that was in the fewest."""
    error: float
    """Largest difference of a mean from what it must be."""
    left: int
    """Open files and threads that were not there before the first round."""


def update_of(place: int, parties: int) -> float:
    """What the common vector is multiplied with to be the update of a party; the mean of all is the vector's half."""
    return (place + 1) / (parties + 1)
