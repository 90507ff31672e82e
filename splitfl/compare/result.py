"""What came out of a cell: one file each, written whole, read again by ``--resume``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import splitfl
from splitfl.compare.cells import Cell
from splitfl.errors import DataError
from splitfl.files import replace_text
from splitfl.metrics import machine

SCORE, BEFORE = "score", "score before"
SENT, RECEIVED, HANDED = "bytes sent", "bytes received", "bytes handed out"
PARTY_S, OWNER_S, WALL_S = "party seconds", "owner seconds", "seconds"
PARTY_FLOP, OWNER_FLOP = "party FLOP", "owner FLOP"
PARTY_MEMORY, OWNER_MEMORY = "party memory", "owner memory"
TRIPS, MONEY, ANSWERED, PARTIES = "round trips", "money", "tokens answered", "parties"
MARGIN, GIVEN = "emulator margin", "share of the trunk given"
UNITS = {
    SCORE: "", BEFORE: "", SENT: "bytes", RECEIVED: "bytes", HANDED: "bytes", PARTY_S: "s", OWNER_S: "s", WALL_S: "s",
    PARTY_FLOP: "FLOP", OWNER_FLOP: "FLOP", PARTY_MEMORY: "bytes", OWNER_MEMORY: "bytes", TRIPS: "round trips",
    MONEY: "", ANSWERED: "tokens", PARTIES: "parties", MARGIN: "points of the score", GIVEN: "share",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What one attack came to, at one level of knowledge."""

    name: str
    knowledge: str
    metric: str
    value: float
    low: float
    high: float
    baseline: float
    """What guessing without a look at what crossed comes to."""
    beyond: float
    """Value less baseline, on the same records."""
    beyond_low: float
    beyond_high: float
    side: str = "holder"
    """Whose secret it is after: the data holder's, or the owner's."""

    @property
    def advantage(self) -> float:
        """Of what guessing leaves over, the share that it gets: 0 is guessing or worse, 1 is everything."""
        room = 1.0 - self.baseline
        return max(0.0, min(1.0, self.beyond / room)) if room > 0 else 0.0

    @property
    def works(self) -> bool:
        """Whether it does better than guessing, by its interval."""
        return self.beyond_low > 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A cell's result."""

    data: str
    cut: str
    protocol: str
    mechanism: str
    design: str
    seed: int
    metric: str
    figures: Mapping[str, float] = field(default_factory=dict)
    attacks: Sequence[Attacked] = ()
    sends: Sequence[str] = ()
    """Tensors that may leave the party: hidden, gradient, update, logits, adapter."""
    hands: str = ""
    """What the owner hands out: kit, emulator or model."""
    summed: str = ""
    """How updates are summed, in a federation."""
    bound: str = ""
    """What is proven about what leaves, as the run says it."""
    not_attacked: str = ""
    """Why there are no attacks, where there are none."""
    device: str = "cpu"
    failed: str = ""

    @property
    def has_attacks(self) -> bool:
        """Whether the holder's rows were attacked at all."""
        return any(attack.side == "holder" for attack in self.attacks)


def file_of(cell: Cell, out: Path) -> Path:
    """Where a cell's result stands."""
    return out / "cells" / f"{cell.name}.json"


def write_outcome(cell: Cell, digest: str, outcome: Outcome, out: Path) -> None:
    """Write a result whole."""
    record = {"version": splitfl.__version__, "machine": machine(), "digest": digest, **asdict(outcome)}
    replace_text(file_of(cell, out), json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_outcome(path: Path) -> tuple[str, Outcome]:
    """A result, and the digest of the cell that it is of.

    Raises:
        DataError: it cannot be read, or is no result.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest = str(record.pop("digest"))
        record = {name: value for name, value in record.items() if name not in ("version", "machine")}
        attacks = tuple(Attacked(**attack) for attack in record.pop("attacks"))
        return digest, Outcome(**{**record, "sends": tuple(record["sends"])}, attacks=attacks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no result of a cell ({type(error).__name__}).", hint="remove it") from error


def done_cells(cells: Sequence[Cell], digests: Mapping[str, str], out: Path) -> dict[str, Outcome]:
    """Results that are there already, of these very cells; failed ones are none."""
    found = {}
    for cell in cells:
        path = file_of(cell, out)
        if path.is_file():
            digest, outcome = read_outcome(path)
            if digest == digests[cell.name] and not outcome.failed:
                found[cell.name] = outcome
    return found
