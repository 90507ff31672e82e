"""Rounds whose rule needs every update in the clear (stacks, residuals, norm weights): all are kept, then combined.

What a party sends is opaque here: the rule that made it reads it again in `combine`. The result need not be a mean, so
neither side opens one: the parties use `RoundTask.exchange`, which gives them the result's bytes as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeAlias

from splitfl.aggregation.sums import Opened, RoundTerms
from splitfl.errors import InternalError, PeerError

Combine: TypeAlias = Callable[[RoundTerms, Mapping[str, bytes]], bytes]
"""The result from the update of each party, by public key. May raise `PeerError`: the attempt then ends."""
Check: TypeAlias = Callable[[RoundTerms, str, bytes], None]
"""Whether one update can be part of the result; raises `PeerError` if not."""


class Combiner:
    """A `splitfl.aggregation.sums.Summer` that collects. Its memory is all updates of the round together.

    Args:
        terms: of the round.
        combine: called once, with every update.
        check: called with each update as it comes.
        max_bytes: largest update.
    """

    opens: ClassVar[bool] = True

    def __init__(self, terms: RoundTerms, combine: Combine, *, check: Check, max_bytes: int) -> None:
        self.terms, self._combine, self._check, self._max_bytes = terms, combine, check, max_bytes
        self._updates: dict[str, bytes] = {}

    def accept(self, party: str, blob: bytes) -> None:
        """Keep one update.

        Raises:
            PeerError: of nobody in the round, there already, too large, or refused by the rule.
        """
        if party not in self.terms.parties or party in self._updates:
            raise PeerError("An update came that is not expected.", expected="one of each party of the round")
        if len(blob) > self._max_bytes:
            raise PeerError(f"An update of {len(blob)} bytes came.", expected=f"at most {self._max_bytes}")
        self._check(self.terms, party, blob)
        self._updates[party] = blob

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose updates are here, sorted."""
        return tuple(sorted(self._updates))

    def finish(self, reveals: Mapping[str, bytes]) -> bytes:
        """What `combine` makes of them, in the order of the parties' keys.

        Raises:
            PeerError: there is no update, or the rule cannot combine these.
        """
        if not self._updates:
            raise PeerError("There is no update to combine.")
        return self._combine(self.terms, {party: self._updates[party] for party in self.survivors})

    def open(self, result: bytes) -> Opened:
        """Never.

        Raises:
            InternalError: always; the result of such a rule is no mean.
        """
        raise InternalError("The result of a rule that needs every update is no mean.")
