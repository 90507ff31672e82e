"""A masked sum, as the coordinator sees it: it adds blobs, and takes off the masks that are left of the sum.

What it needs to know of the round comes with the submissions themselves: each carries its sender's mask key and names
the cohort. It holds one sum and one submission at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from secrets import SystemRandom
from typing import ClassVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from splitfl.aggregation.identity import Identities, identity_of, short
from splitfl.aggregation.mask_blobs import (
    Layout,
    Reveal,
    Trailer,
    commitment,
    mask_info,
    name_all,
    numbers_tag,
    threshold,
)
from splitfl.aggregation.masks import MaskSealer, check_mask_terms, mask_binding
from splitfl.aggregation.noise import NoisePlan, grid_for
from splitfl.aggregation.sealed import SIGNATURE, agreed_key, check_length, unsigned
from splitfl.aggregation.shamir import combine
from splitfl.aggregation.streams import Keyed, Ring, add_streams, aligned
from splitfl.aggregation.sums import Opened, RoundTerms
from splitfl.errors import InternalError, PeerError, WireError

_TRIES = 200

Right = Callable[[bytes], bool]
"""Whether a secret is the one that was meant."""


class MaskSummer:
    """The coordinator's side of one attempt at a round; see `splitfl.aggregation.sums.Summer`.

    Args:
        terms: of the round.
        identities: signing keys of the parties; None leaves it to the channel to say who sent what, and to bring it
            unchanged.
        noise: as the parties have it.
        allow_two: as the parties have it.

    Raises:
        UsageError: as for `MaskSealer`.
    """

    opens: ClassVar[bool] = True
    sealer: ClassVar[type[MaskSealer]] = MaskSealer

    def __init__(
        self,
        terms: RoundTerms,
        identities: Identities | None = None,
        *,
        noise: NoisePlan | None = None,
        allow_two: bool = False,
    ) -> None:
        self._least = check_mask_terms(terms, noise, allow_two=allow_two)
        self.terms, self._identities = terms, identities
        self.binding = mask_binding(terms, self.sealer.kind, noise)
        self.grid = grid_for(terms, noise)
        self._enough = noise.enough if noise is not None else 0
        self._layout = Layout(terms)
        self._sum: Ring | None = None
        self._group: Trailer | None = None
        self._trailers: dict[str, Trailer] = {}
        self._finished = False

    def accept(self, party: str, blob: bytes) -> None:
        """Add one masked update.

        Raises:
            WireError: not of the round, there already, another length, not signed by the party, or masked for another
                cohort than the others. The sum is as it was before.
        """
        if self._finished:
            raise WireError(f"The update of party {short(party)} came after the sum was opened.")
        self._check_sender(party)
        check_length(blob, self._layout.submission_body + SIGNATURE, "submit", party)
        trailer = self._read_trailer(party, memoryview(blob))
        self._check_group(party, trailer)
        numbers = np.frombuffer(blob, dtype="<u4", count=self._layout.numbers)
        if self._sum is None:
            self._sum = np.frombuffer(aligned(4 * len(numbers), zeros=False), dtype=np.uint32)
            self._sum[:] = numbers
        else:
            np.add(self._sum, numbers, out=self._sum)
        self._group = self._group or trailer
        self._trailers[party] = trailer

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose updates are in the sum, sorted."""
        return tuple(sorted(self._trailers))

    def finish(self, reveals: Mapping[str, bytes]) -> bytes:
        """Take the masks off the sum.

        Reveals that cannot be used are left out as long as enough are left.

        Raises:
            WireError: too few survivors or usable reveals, or a secret that cannot be rebuilt from them; what comes out
                is not a sum of updates within the clip. Names the parties that stand in the way.
        """
        if self._finished:
            raise InternalError("A masked sum was opened twice.")
        group, survivors = self._ready()
        usable = self._usable(reveals, group, survivors)
        streams: list[Keyed] = []
        for party in group.cohort:
            if party in self._trailers:
                seed = self._rebuild(party, group, usable, _commits_to(self._trailers[party].commitment))
                streams.append((seed, -1))
            else:
                streams += self._pair_masks(party, group, usable)
        if self._sum is None:
            raise InternalError("There is no sum.")
        self._finished = True
        add_streams(self._sum, streams)
        self._check()
        return self._layout.write_result(self.binding, survivors, self._sum)

    def open(self, result: bytes) -> Opened:
        """The mean.

        Raises:
            InternalError: this way of summing hides it from the coordinator.
            WireError: not a result of this attempt.
        """
        if not self.opens:
            raise InternalError("The coordinator of a hidden sum cannot open it.")
        survivors = self.survivors
        sums = self._layout.read_result(result, self.binding, survivors)
        mean, weight = self.grid.decode(sums.view(np.int32), len(survivors))
        return Opened(mean=mean, weight=weight, parties=len(survivors))

    # ---- steps

    def _key(self, party: str) -> Ed25519PublicKey | None:
        return None if self._identities is None else identity_of(self._identities, party)

    def _check_sender(self, party: str) -> None:
        if party not in self.terms.parties:
            raise WireError(f"Party {short(party)} is not of this round.")
        if party in self._trailers:
            raise WireError(f"The update of party {short(party)} is in the sum already.", expected="one update a party")

    def _read_trailer(self, party: str, blob: memoryview) -> Trailer:
        """What stands behind the numbers, signature and tag checked where the identities are known."""
        end, key = 4 * self._layout.numbers, self._key(party)
        tail = bytes(blob[end:])
        body = unsigned(key, tail, self._layout.trailer_bytes, b"submit", self.binding, party)
        trailer = self._layout.read_trailer(body)
        if key is not None and numbers_tag(trailer.tag_key, blob[:end]) != trailer.tag:
            raise WireError(
                f"The update of party {short(party)} was changed on its way.", hint="the party sends it again"
            )
        return trailer

    def _check_group(self, party: str, trailer: Trailer) -> None:
        if party not in trailer.cohort or len(trailer.cohort) < threshold(len(trailer.roster), self._least):
            raise WireError(
                f"The update of party {short(party)} is masked for a cohort of {len(trailer.cohort)}.",
                expected=f"at least {threshold(len(trailer.roster), self._least)} parties, itself among them",
            )
        if self._group is not None and trailer.group != self._group.group:
            raise WireError(
                f"The update of party {short(party)} is masked for other parties than the first one was.",
                expected="the same adverts and the same cohort for all",
                hint="every party must have been told the same; the round needs another attempt",
            )

    def _ready(self) -> tuple[Trailer, tuple[str, ...]]:
        survivors = self.survivors
        needed = self._least
        if self._group is not None:
            needed = max(threshold(len(self._group.roster), self._least), self._enough)
        if self._group is None or len(survivors) < needed:
            missing = () if self._group is None else set(self._group.cohort) - set(survivors)
            raise WireError(
                f"{len(survivors)} updates are in the sum; missing: {name_all(sorted(missing))}.",
                expected=f"at least {needed}",
                hint="the round needs another attempt",
            )
        return self._group, survivors

    def _usable(self, reveals: Mapping[str, bytes], group: Trailer, survivors: tuple[str, ...]) -> dict[str, Reveal]:
        length = self._layout.reveal_body(len(group.cohort), len(survivors))
        usable, wrong = {}, {}
        for party, blob in reveals.items():
            try:
                if party not in self._trailers:
                    raise WireError(f"Party {short(party)} is no survivor.")
                body = unsigned(self._key(party), blob, length, b"reveal", self.binding, party)
                usable[party] = self._layout.read_reveal(body, group.cohort, survivors)
            except PeerError as error:
                wrong[party] = error.problem
        needed = threshold(len(group.roster), self._least)
        if len(usable) < needed:
            missing = [party for party in survivors if party not in usable and party not in wrong]
            raise WireError(
                f"{len(usable)} of {len(survivors)} survivors gave what opens the sum; missing: {name_all(missing)}; "
                f"wrong: {name_all(wrong)}." + "".join(f" {problem}" for problem in list(wrong.values())[:1]),
                expected=f"at least {needed}",
                hint="the round needs another attempt",
            )
        return usable

    def _rebuild(self, party: str, group: Trailer, usable: Mapping[str, Reveal], right: Right) -> bytes:
        """The secret of `party`, from enough shares of it."""
        needed = threshold(len(group.roster), self._least)
        for holders in _choices(list(usable), needed):
            shares = {group.roster.index(holder) + 1: usable[holder].shares[party] for holder in holders}
            try:
                secret = combine(shares)
            except WireError:
                continue
            if right(secret):
                return secret
        raise WireError(
            f"The shares of what party {short(party)} masked with do not fit together.",
            expected=f"{needed} shares as that party made them",
            hint=f"another attempt, without party {short(party)} if it happens again",
        )

    def _pair_masks(self, dropped: str, group: Trailer, usable: Mapping[str, Reveal]) -> list[Keyed]:
        """What takes the masks between a party that dropped out and the survivors off the sum."""
        claims = Counter(reveal.dropped_keys[dropped] for reveal in usable.values())
        private = X25519PrivateKey.from_private_bytes(
            self._rebuild(dropped, group, usable, _is_behind(claims.most_common(1)[0][0]))
        )
        streams: list[Keyed] = []
        for survivor, trailer in self._trailers.items():
            key = agreed_key(private, trailer.mask_key, mask_info(group.roster_digest, survivor, dropped))
            streams.append((key, -1 if survivor < dropped else 1))
        return streams

    def _check(self) -> None:
        """Refuse a sum that cannot be one, before anybody gets it."""
        if self._sum is not None:
            self.grid.check(self._sum.view(np.int32), len(self._trailers))


def _commits_to(expected: bytes) -> Right:
    return lambda secret: commitment(secret) == expected


def _is_behind(public: bytes) -> Right:
    return lambda secret: X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == public


def _choices(holders: list[str], needed: int) -> Iterator[list[str]]:
    """The first so many, then others: a share that its holder changed spoils each choice that it is in."""
    yield holders[:needed]
    if len(holders) > needed:
        for _ in range(_TRIES):
            yield SystemRandom().sample(holders, needed)
