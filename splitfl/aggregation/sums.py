"""How the updates of one round are summed: what a party does, what the coordinator does, and what they exchange.

A round is a fixed order of stages. Every way of summing walks the same stages and leaves out those that it does not
need:

    stage       party -> coordinator                coordinator -> every party of the round
    advertise   one signed public value             the values of all
    share       one sealed blob for each peer       the blobs for this party
    submit      its update, masked or encrypted     who submitted: the survivors
    agree       its signature under the survivors   the signatures of all
    reveal      what opens the sum, and no more     the result

`Sealer` is a party's side of one round, `Summer` the coordinator's. Neither does I/O, so both can be tested against
each other in one process. What a `Summer` takes in comes from peers: it checks sizes and senders before anything else,
and it adds while updates come in, so that its memory is one sum and one update, however many parties there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Stage: TypeAlias = Literal["advertise", "share", "submit", "agree", "reveal"]
STAGES: tuple[Stage, ...] = ("advertise", "share", "submit", "agree", "reveal")
Vector: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """What every party of a round and its coordinator must agree on; goes into every key, signature and tag."""

    federation: str
    """Identity of the federation, 32 hexadecimal digits."""
    round: int
    """Number of the round, from 0."""
    attempt: int
    """How often the round was begun; a new attempt has new keys and masks, and the same updates."""
    parties: tuple[str, ...]
    """Public CURVE keys (Z85) of those who may take part, sorted."""
    length: int
    """Values in one update."""
    clip: float
    """Largest magnitude of one value; what is beyond is cut to it before summing."""
    max_weight: float
    """Largest weight of one party."""
    layout: str
    """Digest of which value belongs where in the adapter."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A sum that has been opened."""

    mean: Vector
    """Weighted mean of the updates, float32 [length]."""
    weight: float
    """Sum of the weights."""
    parties: int
    """How many updates are in it."""


class Sealer(Protocol):
    """A party's side of one round."""

    stages: ClassVar[tuple[Stage, ...]]
    """Stages that this way of summing needs, in order; ``submit`` always."""

    def advertise(self) -> bytes:
        """What all others may see, signed."""

    def share(self, adverts: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """One blob for each other party, readable to it alone.

        Args:
            adverts: of every party of the round, by public key, this one's included.
        """

    def submit(self, vector: Vector, weight: float, adverts: Mapping[str, bytes], shares: Mapping[str, bytes]) -> bytes:
        """The update as it leaves.

        Args:
            vector: finite, float32 [length].
            weight: of this party, above 0 and at most `RoundTerms.max_weight`.
            adverts: as above; empty where the stage is left out.
            shares: the blobs that the others made for this party, by their public keys.
        """

    def agree(self, survivors: Sequence[str]) -> bytes:
        """This party's signature under the survivors; it signs one set a round."""

    def reveal(self, survivors: Sequence[str], agreements: Mapping[str, bytes]) -> bytes:
        """What the coordinator needs to open the sum over `survivors`, and nothing more. At most once a round.

        Args:
            survivors: as in `agree`.
            agreements: their signatures, by public key, of as many as the way of summing needs to know that the
                coordinator told everybody the same; one that is wrong is refused.

        Raises:
            PeerError: too few signatures, a wrong one, or too few survivors.
        """

    def open(self, result: bytes) -> Opened:
        """The mean, from what the coordinator sent to all.

        Raises:
            PeerError: it does not open, or it cannot be a mean of clipped updates.
        """


class Summer(Protocol):
    """The coordinator's side of one round."""

    opens: ClassVar[bool]
    """Whether the coordinator learns the mean."""

    def accept(self, party: str, blob: bytes) -> None:
        """Check one submission and add it.

        Raises:
            PeerError: not of the round, there already, of a wrong size, or not what this way of summing sends. The sum
                is as it was before.
        """

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose updates are in the sum, sorted."""

    def finish(self, reveals: Mapping[str, bytes]) -> bytes:
        """The result for all parties.

        Raises:
            PeerError: the sum cannot be opened with these; names the parties that stand in the way.
        """

    def open(self, result: bytes) -> Opened:
        """The mean, where `opens` is true.

        Raises:
            InternalError: this way of summing does not show it to the coordinator.
        """
