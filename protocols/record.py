"""What every protocol states about itself."""

from __future__ import annotations

from dataclasses import dataclass

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
