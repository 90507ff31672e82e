"""A masked sum that the coordinator adds and never sees.

As `splitfl.aggregation.masks`, and each party adds one stream more, under a key that all of the cohort know and the
coordinator does not. Taking the masks off leaves the coordinator with the sum plus the survivors' streams; it sends
that to all, and each party takes the streams off.

The key: each party puts 32 random bytes into the shares that it seals for the others; hashed together, those of the
cohort are the key. There is no leader whose dropping out would matter. Every party has its own stream of it, because
who survives is known only after the submissions have left.

Hides: the sum from the coordinator, and from whoever reads what the coordinator holds. Does not hide: the sum from any
party, so from a coordinator that one party helps; then the masks still hide the single updates. The coordinator cannot
check the opened sum: the parties do.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from splitfl.aggregation.mask_blobs import SHARES
from splitfl.aggregation.mask_sums import MaskSummer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.sealed import KEY, digest
from splitfl.aggregation.streams import Keyed, Ring, add_streams
from splitfl.errors import InternalError


class HiddenSealer(MaskSealer):
    """A party's side; arguments as for `MaskSealer`."""

    kind: ClassVar[bytes] = b"mask+hidden"
    extra_share: ClassVar[int] = KEY

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._contribution = os.urandom(KEY)
        self._group_key = b""

    def _for_the_group(self, roster: bytes) -> bytes:
        return self._contribution

    def _more_streams(self) -> list[Keyed]:
        parts = [part for party in self._cohort for part in (party.encode("ascii"), self._shares[party][SHARES:])]
        self._group_key = digest(b"splitfl group key 1", self._roster, *parts)
        return [(self._hiding_key(self.party), 1)]

    def _opened(self, sums: Ring) -> Ring:
        opened = sums.copy()
        add_streams(opened, [(self._hiding_key(party), -1) for party in self._survivors])
        return opened

    def _hiding_key(self, party: str) -> bytes:
        if not self._group_key:
            raise InternalError("The group has no key yet.")
        return digest(b"splitfl hiding stream 1", self._group_key, party.encode("ascii"))


class HiddenSummer(MaskSummer):
    """The coordinator's side; arguments as for `MaskSummer`."""

    opens: ClassVar[bool] = False
    sealer: ClassVar[type[MaskSealer]] = HiddenSealer

    def _check(self) -> None:
        """Nothing can be checked here: the parties check what they open."""
