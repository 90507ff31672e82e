"""A masked sum, as a party sees it: the coordinator adds what it cannot read, and learns the sum alone.

After Bonawitz and others, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017, with signed
keys and a signed survivor set (their protocol against an active coordinator). Party i of the cohort sends

    y_i = q_i + PRG(b_i) + sum over j > i of PRG(s_ij) - sum over j < i of PRG(s_ij)    modulo 2^32

where q_i is its update on the grid, s_ij a key that i and j alone can compute, b_i a seed of its own. In the sum over
all the pair masks cancel. Before anything is sent, each party gives each other one a share of b_i and of the X25519 key
behind its s_ij, sealed. When the coordinator has said whose updates arrived, each survivor signs that set, and having
seen enough signatures under the same set gives away, for each party, one share: of the seed of one who is in the sum,
of the key of one who dropped out. Enough shares rebuild what has to come off the sum.

Never both for the same party: with the seed and the key of one party its update could be read. That is why a party
signs one set, reveals once, and keeps nothing afterwards. A second attempt of the round has new keys.

Stages: advertise, share, submit, agree, reveal. Parties may drop out at each, down to `threshold`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from splitfl.aggregation.grid import check_vector
from splitfl.aggregation.identity import Identities, identity_of, short, signing_key
from splitfl.aggregation.mask_blobs import (
    ADVERT_BODY,
    SHARES,
    Advert,
    Layout,
    Reveal,
    Trailer,
    agreement_hash,
    commitment,
    mask_info,
    name_all,
    numbers_tag,
    roster_digest,
    share_bound,
    threshold,
)
from splitfl.aggregation.noise import NoisePlan, grid_for
from splitfl.aggregation.noiser import Noiser
from splitfl.aggregation.sealed import (
    KEY,
    SIGNATURE,
    agreed_key,
    check_length,
    check_signature,
    check_terms,
    seal,
    sign,
    signed,
    terms_digest,
    unseal,
    unsigned,
)
from splitfl.aggregation.shamir import SHARE, split
from splitfl.aggregation.streams import Keyed, Ring, add_streams, aligned
from splitfl.aggregation.sums import Opened, RoundTerms, Stage, Vector
from splitfl.errors import InternalError, UsageError, WireError
from splitfl.wire.keys import KeyPair

FEWEST = 3


class MaskSealer:
    """One party's side of one attempt at a round; see `splitfl.aggregation.sums.Sealer`.

    Args:
        terms: of the round; this party is in them.
        keys: this party's CURVE pair, from which its signing identity follows.
        identities: signing keys of all parties of the round, as this party has pinned them.
        noise: what makes the sum differentially private; the same at all parties and the coordinator.
        noiser: keeps the noised update between the attempts of a round; needed where `noise` is given.
        allow_two: sum the updates of two parties, each of which can then compute the other's: with `noise` only.

    Raises:
        UsageError: fewer than three parties; terms that cannot be; this party is not in them; noise for other terms.
        WireError: the identity of a party is not pinned, or this party's own is pinned wrongly.
    """

    stages: ClassVar[tuple[Stage, ...]] = ("advertise", "share", "submit", "agree", "reveal")
    kind: ClassVar[bytes] = b"mask"
    extra_share: ClassVar[int] = 0

    def __init__(
        self,
        terms: RoundTerms,
        keys: KeyPair,
        identities: Identities,
        *,
        noise: NoisePlan | None = None,
        noiser: Noiser | None = None,
        allow_two: bool = False,
    ) -> None:
        self._least = check_mask_terms(terms, noise, allow_two=allow_two)
        if noise is not None and noiser is None:
            raise UsageError("Noise without a place to keep it.", expected="a Noiser that outlives the attempt")
        self.terms, self.noise, self._noiser = terms, noise, noiser
        self.party = keys.public.decode("ascii")
        if self.party not in terms.parties:
            raise UsageError("This party is not of the round.", expected=name_all(terms.parties))
        self._identity = signing_key(keys)
        self._peers = {party: identity_of(identities, party) for party in terms.parties if party != self.party}
        self.binding = mask_binding(terms, self.kind, noise)
        self.grid = grid_for(terms, noise)
        self._layout = Layout(terms)
        self._mask_key: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._sealing_key = X25519PrivateKey.generate()
        self._seed: bytes | None = os.urandom(KEY)
        own = Advert(
            self._mask_key.public_key().public_bytes_raw(),
            self._sealing_key.public_key().public_bytes_raw(),
            commitment(self._seed),
        )
        self._advert = signed(self._identity, b"advertise", self.binding, self.party, own.body())
        self._adverts: dict[str, Advert] = {}
        self._roster = b""
        self._shares: dict[str, bytes] = {}
        self._pair_keys: dict[str, bytes] = {}
        self._blobs: dict[str, bytes] = {}
        self._cohort: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._reveal = b""

    def advertise(self) -> bytes:
        """Public keys for this attempt and the commitment to the self-mask seed, signed; the same at each call."""
        return self._advert

    def share(self, adverts: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """A share of this party's seed and of its mask key for each other party; the same at each call.

        Raises:
            WireError: an advert is not signed by its party for this attempt, this party's own is not among them, there
                are too few, or there were others before.
        """
        roster = self._read_adverts(adverts)
        if self._blobs:
            if roster != self._roster:
                raise WireError("The coordinator changed the list of who takes part.", expected="one list an attempt")
            return self._blobs
        mask_key, seed = self._secrets()
        members = sorted(self._adverts)
        needed = threshold(len(members), self._least)
        of_seed = split(seed, len(members), needed)
        of_key = split(mask_key.private_bytes_raw(), len(members), needed)
        blobs = {}
        for member, *pair in zip(members, of_seed, of_key, strict=True):
            content = b"".join(pair) + self._for_the_group(roster)
            if member == self.party:
                self._shares[member] = content
            else:
                self._pair_keys[member] = self._pair_key(mask_key, member, roster)
                bound = share_bound(roster, self.party, member)
                blobs[member] = seal(self._channel_key(member, bound), content, bound)
        self._roster, self._blobs = roster, blobs
        return blobs

    def submit(self, vector: Vector, weight: float, adverts: Mapping[str, bytes], shares: Mapping[str, bytes]) -> bytes:
        """The masked update. Once an attempt: two under the same masks would show their difference.

        Raises:
            DataError: values or weight that cannot be sent.
            WireError: the adverts are not those of `share`, a share cannot be opened, or too few came.
        """
        if self._cohort or not self._blobs:
            raise InternalError("An update was submitted twice in one attempt, or before the keys were shared.")
        if self._read_adverts(adverts) != self._roster:
            raise WireError("The coordinator changed the list of who takes part.", expected="one list an attempt")
        check_vector(vector, self.terms.length)
        numbers = aligned(4 * self._layout.numbers, zeros=False)
        ring = np.frombuffer(numbers, dtype="<u4")
        self._encode(vector, weight, ring)  # writes every number
        self._take_shares(shares)
        add_streams(ring, self._streams())
        tail = self._layout.write_trailer(self._trailer(numbers))
        return b"".join((numbers, signed(self._identity, b"submit", self.binding, self.party, tail)))

    def agree(self, survivors: Sequence[str]) -> bytes:
        """The signature under the survivors; asked again for the same set, it is the same.

        Raises:
            WireError: this party is not among them, one is not of the cohort, there are too few to open a sum, or
                another set was signed before.
        """
        chosen = tuple(sorted(set(survivors)))
        if not self._cohort:
            raise InternalError("Survivors were named before this party submitted.")
        if self._survivors and chosen != self._survivors:
            raise WireError(
                "The coordinator asked for a second set of survivors in one attempt; opened together with the first, "
                "it could show single updates.",
                expected="one set an attempt",
                hint="nothing was revealed for the second; the round is dropped here",
            )
        needed = self._needed()
        if self.party not in chosen or not set(chosen) <= set(self._cohort) or len(chosen) < needed:
            raise WireError(
                f"The coordinator named {len(chosen)} survivors of a cohort of {len(self._cohort)}.",
                expected=f"at least {needed} parties of the cohort, this one among them",
                hint="the round needs another attempt",
            )
        self._survivors = chosen
        return sign(self._identity, b"agree", self.binding, self.party, self._agreement())

    def reveal(self, survivors: Sequence[str], agreements: Mapping[str, bytes]) -> bytes:
        """One share for each party of the cohort: of its seed if it survived, of its mask key if not.

        Every signature that is given must be right. Enough must be there that no other set can have as many, unless
        more than a third of the parties sign two sets.

        Raises:
            WireError: other survivors than agreed, a wrong signature, or too few.
        """
        chosen = tuple(sorted(set(survivors)))
        if not self._survivors or chosen != self._survivors:
            raise WireError("The coordinator asked to reveal over survivors that this party did not agree to.")
        if self._reveal:
            return self._reveal
        self._check_agreements(agreements)
        if self._noiser is not None:
            self._noiser.note_opened(self.terms, chosen)
        shares = {}
        for party in self._cohort:
            start = 0 if party in chosen else SHARE
            shares[party] = self._shares[party][start : start + SHARE]
        dropped = {party: self._adverts[party].mask_key for party in self._cohort if party not in chosen}
        body = self._layout.write_reveal(Reveal(chosen, shares, dropped), self._cohort)
        self._reveal = signed(self._identity, b"reveal", self.binding, self.party, body)
        self._mask_key = self._seed = None  # what could answer for another set is gone
        self._shares, self._blobs, self._pair_keys = {}, {}, {}
        return self._reveal

    def open(self, result: bytes) -> Opened:
        """The mean.

        Raises:
            WireError: not the result of this attempt over the survivors agreed to, or it cannot be a mean of clipped
                updates.
        """
        if not self._survivors:
            raise WireError("A result came before this party agreed to the survivors.", hint="take the next round")
        sums = self._layout.read_result(result, self.binding, self._survivors)
        mean, weight = self.grid.decode(self._opened(sums).view(np.int32), len(self._survivors))
        return Opened(mean=mean, weight=weight, parties=len(self._survivors))

    # ---- what the hidden sum does otherwise

    def _for_the_group(self, roster: bytes) -> bytes:
        """What each member of the cohort learns beside the shares: `extra_share` bytes."""
        return b""

    def _more_streams(self) -> list[Keyed]:
        """Further streams on the submission."""
        return []

    def _opened(self, sums: Ring) -> Ring:
        """The sum, from the numbers of the result."""
        return sums

    # ---- steps

    def _secrets(self) -> tuple[X25519PrivateKey, bytes]:
        if self._mask_key is None or self._seed is None:
            raise InternalError("The keys of this attempt have been given up already.")
        return self._mask_key, self._seed

    def _needed(self) -> int:
        needed = threshold(len(self._adverts), self._least)
        return max(needed, self.noise.enough) if self.noise is not None else needed

    def _read_adverts(self, adverts: Mapping[str, bytes]) -> bytes:
        """Check them, keep them, and return the roster's digest."""
        if adverts.get(self.party) != self._advert:
            raise WireError("The coordinator's list of adverts does not hold this party's own.")
        if strangers := set(adverts) - set(self.terms.parties):
            raise WireError(f"{len(strangers)} adverts are of parties that are not of the round.")
        needed = threshold(len(adverts), self._least)
        if len(adverts) < needed:
            raise WireError(
                f"{len(adverts)} parties advertised.", expected=f"at least {needed}", hint="wait for more parties"
            )
        roster = roster_digest(self.binding, adverts)
        if roster == self._roster:
            return roster
        read = {self.party: Advert.read(self._advert)}
        for party, advert in adverts.items():
            if party != self.party:
                key = self._peers[party]
                read[party] = Advert.read(unsigned(key, advert, ADVERT_BODY, b"advertise", self.binding, party))
        if not self._roster:
            self._adverts = read
        return roster

    def _channel_key(self, peer: str, bound: bytes) -> bytes:
        public = self._adverts[peer].sealing_key
        return agreed_key(self._sealing_key, public, b"splitfl share key 1" + bound, peer)

    def _pair_key(self, mask_key: X25519PrivateKey, peer: str, roster: bytes) -> bytes:
        return agreed_key(mask_key, self._adverts[peer].mask_key, mask_info(roster, self.party, peer), peer)

    def _take_shares(self, blobs: Mapping[str, bytes]) -> None:
        """Open what the others shared; those whose shares came are the cohort."""
        if not set(blobs) <= set(self._adverts) - {self.party}:
            raise WireError("Shares came from parties that did not advertise.", expected=name_all(self._adverts))
        length = SHARES + self.extra_share
        taken = {self.party: self._shares[self.party]}
        for peer, blob in blobs.items():
            bound = share_bound(self._roster, peer, self.party)
            content = unseal(self._channel_key(peer, bound), blob, bound, f"The share of party {short(peer)}")
            check_length(content, length, "share", peer)
            taken[peer] = content
        needed = threshold(len(self._adverts), self._least)
        if len(taken) < needed:
            raise WireError(
                f"Shares of {len(taken)} parties are here.", expected=f"at least {needed}", hint="another attempt"
            )
        self._shares, self._cohort = taken, tuple(sorted(taken))

    def _encode(self, vector: Vector, weight: float, ring: Ring) -> None:
        whole = ring.view(np.int32)
        if self.noise is None or self._noiser is None:
            self.grid.encode(vector, weight, whole)
        else:
            self._noiser.encode(self.terms, self.grid, self.noise, vector, weight, whole)

    def _trailer(self, numbers: memoryview) -> Trailer:
        own, key = self._adverts[self.party], os.urandom(KEY)
        roster = tuple(sorted(self._adverts))
        tag = numbers_tag(key, numbers)
        return Trailer(own.mask_key, own.commitment, self._roster, key, tag, roster, self._cohort)

    def _streams(self) -> list[Keyed]:
        _, seed = self._secrets()
        streams: list[Keyed] = [(seed, 1), *self._more_streams()]
        for peer in self._cohort:
            if peer != self.party:
                streams.append((self._pair_keys[peer], 1 if self.party < peer else -1))
        return streams

    def _agreement(self) -> bytes:
        return agreement_hash(self._layout, (self._roster, sorted(self._adverts), self._cohort), self._survivors)

    def _check_agreements(self, agreements: Mapping[str, bytes]) -> None:
        if strangers := set(agreements) - set(self._survivors):
            raise WireError(f"{len(strangers)} signatures under the survivors are of parties that are not survivors.")
        expected = self._agreement()
        for party, signature in agreements.items():
            check_length(signature, SIGNATURE, "agree", party)
            key = self._identity.public_key() if party == self.party else self._peers[party]
            check_signature(key, signature, b"agree", self.binding, party, expected)
        missing = [party for party in self._survivors if party not in agreements]
        needed = threshold(len(self._adverts), self._least)
        if len(agreements) < needed:
            raise WireError(
                f"{len(agreements)} of {len(self._survivors)} survivors signed; missing: {name_all(missing)}.",
                expected=f"at least {needed} signatures under the same survivors",
                hint="the round needs another attempt",
            )


def check_mask_terms(terms: RoundTerms, noise: NoisePlan | None, *, allow_two: bool) -> int:
    """Refuse terms under which masks hide nothing.

    Returns:
        The fewest parties that a sum may hold.

    Raises:
        UsageError: as `MaskSealer` says.
    """
    check_terms(terms)
    if allow_two and noise is None:
        raise UsageError(
            "A masked sum of two updates shows each party the other's.",
            expected=f"{FEWEST} parties, or noise",
            hint="switch differential privacy on, or sum in the clear and know it",
        )
    least = 2 if allow_two else FEWEST
    if len(terms.parties) < least:
        raise UsageError(
            f"A masked sum of {len(terms.parties)} updates hides none of them.",
            expected=f"at least {least} parties" + ("" if allow_two else ", or two with noise"),
            hint="with two parties the sum less one's own update is the other's",
        )
    if noise is not None:
        noise.check(terms)
    return least


def mask_binding(terms: RoundTerms, kind: bytes, noise: NoisePlan | None) -> bytes:
    """32 bytes that stand for the attempt and this way of summing; in every signature and key."""
    return terms_digest(terms, kind, noise.descriptor() if noise is not None else b"no noise")
