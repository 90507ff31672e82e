"""What every protocol states about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitfl.privacy.disclosure import Disclosure


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named design: who holds and trains what, and what may cross."""

    name: str
    source: str
    """The paper or system it comes from."""
    party_trains: str
    owner_trains: str
    disclosure: Disclosure
    trains_bottom: bool = True
    """Whether the party tunes layers below the cut, so that what is sent of a row changes from step to step."""
    sends_once: bool = False
    """Whether each row is sent once, and the trunk's reply is kept by the party for all epochs."""
    offline: bool = False
    """Whether the party trains without a session, on an emulator of the trunk."""
    whole: bool = False
    """Whether the party holds the whole model itself, and no owner is asked for anything."""
    federated: bool = False
    """Whether it only makes sense with other parties, in rounds."""
    distils: bool = False
    """Whether what models say about public rows is shared, and no weights are."""
    quantise: Literal["none", "int8", "int4"] = "none"
    """Coding of what the party sends, unless the run chooses another."""
    decorrelate: float = 0.0
    """Weight of the distance correlation in the loss, unless the run chooses another."""

    @property
    def sends_gradients(self) -> bool:
        """Whether a gradient may cross at all; the disclosure decides, and both sessions hold to it."""
        return self.disclosure.allows("backward", ("gradient",), "party to owner")
