"""The common state as bytes: as it is, or sealed where the coordinator is not to know it.

With a sum that the coordinator cannot open, the state that it keeps for parties who come later must be closed to it as
well. A party seals it to every key that it has pinned, so whoever is pinned there can open it, this party included.
Sealing draws a key, so two parties never have the same bytes: one proposes, the others open and compare.

What sealing does not give: the coordinator can hand out an older state of the same federation for a newer one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from splitfl.aggregation.error import agrees
from splitfl.aggregation.identity import identity_of, load_identities
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.sealed import open_sealed, seal_for
from splitfl.aggregation.state import State
from splitfl.errors import WireError
from splitfl.wire.keys import load_keys

_PURPOSE = b"federation state"
_NAME = 40  # a public CURVE key in Z85


class PlainStates:
    """States as they are.

    Args:
        rule: of the federation.
        first: the state of the common start.
    """

    def __init__(self, rule: Rule, first: State) -> None:
        self.rule, self.first = rule, first

    def wrap(self, state: State) -> bytes:
        """The bytes that the coordinator keeps."""
        return state.to_bytes()

    def unwrap(self, blob: bytes) -> State:
        """The state in them.

        Raises:
            WireError: there is none of this federation.
        """
        return State.from_bytes(blob, like=self.first)

    def is_as_good(self, blob: bytes, own: State) -> bool:
        """Whether another party's proposal is what this party has computed itself."""
        try:
            other = self.unwrap(blob)
        except WireError:
            return False
        return other.digest == own.digest if self.rule.same_bits else agrees(own, other)


class SealedStates(PlainStates):
    """States that only pinned parties can open.

    Args:
        rule: of the federation.
        first: the state of the common start.
        key: this party's secret key file.
        peers: folder of the pinned keys, this party's among them.
        federation: identity of the federation.
    """

    def __init__(self, rule: Rule, first: State, *, key: Path, peers: Path, federation: str) -> None:
        super().__init__(rule, first)
        self._keys, self._identities = load_keys(key), load_identities(peers)
        self._binding = hashlib.blake2b(federation.encode(), digest_size=32).digest()

    def wrap(self, state: State) -> bytes:
        """Sealed to every pinned key, behind this party's own."""
        recipients = sorted({*self._identities, self._keys.public.decode("ascii")})
        return self._keys.public + seal_for(recipients, state.to_bytes(), self._keys, _PURPOSE, self._binding)

    def unwrap(self, blob: bytes) -> State:
        """The state that a pinned party sealed for this one.

        Raises:
            WireError: nobody pinned has sealed it, or not for this party, or it is no state of this federation.
        """
        try:
            sender = blob[:_NAME].decode("ascii")
        except UnicodeDecodeError as error:
            raise WireError("A sealed state does not begin with a key.") from error
        identity = identity_of(self._identities, sender)
        state = open_sealed(blob[_NAME:], self._keys, sender, identity, _PURPOSE, self._binding)
        return super().unwrap(state)
