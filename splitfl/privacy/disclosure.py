"""The machine-readable list of what a protocol lets leave, to whom, how often and under which bound.

A session refuses every message and tensor that its protocol's `Disclosure` does not list, so the record is enforced and
not only printed. `docs/protocols.md` and each run's `disclosure.json` are generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Direction = Literal["party to owner", "owner to party", "peer to peer", "party to coordinator", "coordinator to party"]


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """One thing that may cross the wire."""

    message: str
    """Wire tag of the message that carries it."""
    tensor: str | None
    """Name of the tensor frame, or None for the header alone."""
    direction: Direction
    content: str
    """What it is, in words a data holder understands."""
    how_often: str
    bound: str
    """The proven bound on what it reveals, or ``"none"``."""


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """Everything a protocol lets cross, and what it never does."""

    crossings: tuple[Crossing, ...]
    never: tuple[str, ...]
    """What does not cross under any option, in words."""
    in_plain_words: str
    """What the receiver can work out from the crossings; no promise beyond what is proven."""

    def allows(self, message: str, tensors: tuple[str, ...], direction: Direction) -> bool:
        """Whether a message of this kind with these tensor frames may cross in this direction."""
        listed = [c for c in self.crossings if c.message == message and c.direction == direction]
        return bool(listed) and set(tensors) <= {c.tensor for c in listed}

    def with_bounds(self, bounds: Mapping[tuple[str, str], str]) -> Disclosure:
        """This disclosure with what a run's mechanisms prove, or do not.

        Args:
            bounds: (message, tensor) to the bound, in words.
        """
        found = tuple(
            replace(c, bound=bounds[c.message, c.tensor])
            if c.tensor is not None and (c.message, c.tensor) in bounds
            else c
            for c in self.crossings
        )
        return replace(self, crossings=found)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as written to ``disclosure.json``."""
        return asdict(self)
