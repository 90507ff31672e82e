"""What the parties of a masked sum send, byte by byte. All lengths follow from the terms, and are checked first.

    advert       mask key 32, sealing key 32 (X25519, public), SHA-256 of the self-mask seed 32; signature
    share        sealed: share of the self-mask seed 33, share of the mask key 33 [, part of the group key 32]
    submission   d + 6 numbers uint32; mask key 32, seed's SHA-256 32, roster digest 32, key 32 and tag 32 of the
                 numbers, roster, cohort; signature from the mask key on
    agreement    signature under roster digest, roster, cohort, survivors
    reveal       survivors; a share 33 for each of the cohort; the mask key 32 of each who dropped out; signature
    result       terms digest 32; survivors; padding to 4; d + 6 numbers uint32

Roster, cohort and survivors are sets of parties, one bit each in the order of the terms. The roster is who advertised,
the cohort who shared, the survivors who submitted.

The tag of a submission's numbers is an AES-GMAC under a fresh key that stands beside it. It finds what was changed by
accident, or by somebody who does not see the submission, at a fiftieth of the time that hashing the numbers takes. Who
does see it is the coordinator, which can change the sum itself; everybody else is kept out by the channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitfl.aggregation.grid import EXTRA
from splitfl.aggregation.identity import short
from splitfl.aggregation.sealed import KEY, SIGNATURE, Buffer, digest
from splitfl.aggregation.shamir import SHARE
from splitfl.aggregation.streams import Ring
from splitfl.aggregation.sums import RoundTerms
from splitfl.errors import WireError

ADVERT_BODY = 3 * KEY
ADVERT = ADVERT_BODY + SIGNATURE
SHARES = 2 * SHARE
_TRAILER_KEYS = 5
_TAGGED = 1 << 30  # bytes under one tag: the library takes no more than 2^31


@dataclass(frozen=True)
class Advert:
    """What a party shows to all others at the start."""

    mask_key: bytes
    sealing_key: bytes
    commitment: bytes

    @classmethod
    def read(cls, body: Buffer) -> Advert:
        """From the body of an advert."""
        return cls(bytes(body[:KEY]), bytes(body[KEY : 2 * KEY]), bytes(body[2 * KEY : ADVERT_BODY]))

    def body(self) -> bytes:
        """The bytes that are signed."""
        return self.mask_key + self.sealing_key + self.commitment


def commitment(seed: bytes) -> bytes:
    """What shows later that a self-mask seed was rebuilt rightly."""
    return hashlib.sha256(b"splitfl self mask 1\0" + seed).digest()


@dataclass(frozen=True)
class Trailer:
    """What stands behind the numbers of a submission."""

    mask_key: bytes
    commitment: bytes
    roster_digest: bytes
    tag_key: bytes
    tag: bytes
    roster: tuple[str, ...]
    cohort: tuple[str, ...]

    @property
    def group(self) -> tuple[bytes, tuple[str, ...], tuple[str, ...]]:
        """What must be the same in all submissions of a sum."""
        return self.roster_digest, self.roster, self.cohort


@dataclass(frozen=True)
class Reveal:
    """What a survivor gives to open the sum."""

    survivors: tuple[str, ...]
    shares: Mapping[str, bytes]
    dropped_keys: Mapping[str, bytes]


@dataclass(frozen=True)
class Layout:
    """Writes and reads the blobs of one round."""

    terms: RoundTerms

    @cached_property
    def set_bytes(self) -> int:
        """Bytes of a set of parties."""
        return (len(self.terms.parties) + 7) // 8

    @cached_property
    def numbers(self) -> int:
        """Whole numbers in an encoded update."""
        return self.terms.length + EXTRA

    @cached_property
    def trailer_bytes(self) -> int:
        """Bytes behind the numbers of a submission, the signature left out."""
        return _TRAILER_KEYS * KEY + 2 * self.set_bytes

    @cached_property
    def submission_body(self) -> int:
        """Bytes of a submission without its signature."""
        return 4 * self.numbers + self.trailer_bytes

    @cached_property
    def result_head(self) -> int:
        """Bytes before the numbers of a result."""
        return (KEY + self.set_bytes + 3) // 4 * 4

    @cached_property
    def result_bytes(self) -> int:
        """Bytes of a result."""
        return self.result_head + 4 * self.numbers

    def reveal_body(self, cohort: int, survivors: int) -> int:
        """Bytes of a reveal without its signature, for so many in cohort and survivors."""
        return self.set_bytes + cohort * SHARE + (cohort - survivors) * KEY

    def write_set(self, members: Iterable[str]) -> bytes:
        """A set of parties of the round."""
        chosen = set(members)
        bits = sum(1 << place for place, party in enumerate(self.terms.parties) if party in chosen)
        return bits.to_bytes(self.set_bytes, "little")

    def read_set(self, data: Buffer) -> tuple[str, ...]:
        """The parties of a set, sorted.

        Raises:
            WireError: a bit stands for nobody.
        """
        bits = int.from_bytes(data, "little")
        if bits >> len(self.terms.parties):
            raise WireError("A set of parties names some that are not of the round.")
        return tuple(party for place, party in enumerate(self.terms.parties) if bits >> place & 1)

    def write_trailer(self, trailer: Trailer) -> bytes:
        """The bytes behind a submission's numbers."""
        keys = trailer.mask_key + trailer.commitment + trailer.roster_digest + trailer.tag_key + trailer.tag
        return keys + self.write_set(trailer.roster) + self.write_set(trailer.cohort)

    def read_trailer(self, data: Buffer) -> Trailer:
        """From the bytes behind a submission's numbers.

        Raises:
            WireError: sets that do not fit into each other.
        """
        start = _TRAILER_KEYS * KEY
        keys = [bytes(data[place : place + KEY]) for place in range(0, start, KEY)]
        middle = start + self.set_bytes
        roster, cohort = self.read_set(data[start:middle]), self.read_set(data[middle:])
        if not set(cohort) <= set(roster):
            raise WireError("A submission's cohort holds parties that did not advertise.")
        return Trailer(keys[0], keys[1], keys[2], keys[3], keys[4], roster, cohort)

    def write_reveal(self, reveal: Reveal, cohort: Sequence[str]) -> bytes:
        """The body of a reveal."""
        dropped = [party for party in cohort if party not in reveal.survivors]
        shares = b"".join(reveal.shares[party] for party in cohort)
        return self.write_set(reveal.survivors) + shares + b"".join(reveal.dropped_keys[party] for party in dropped)

    def read_reveal(self, body: Buffer, cohort: Sequence[str], survivors: Sequence[str]) -> Reveal:
        """From the body of a reveal, whose length has been checked.

        Raises:
            WireError: it is over other survivors.
        """
        if self.read_set(body[: self.set_bytes]) != tuple(survivors):
            raise WireError("A reveal is over other survivors than those whose updates are in the sum.")
        place = self.set_bytes
        shares = {}
        for party in cohort:
            shares[party] = bytes(body[place : place + SHARE])
            place += SHARE
        keys = {}
        for party in cohort:
            if party not in survivors:
                keys[party] = bytes(body[place : place + KEY])
                place += KEY
        return Reveal(tuple(survivors), shares, keys)

    def write_result(self, binding: bytes, survivors: Sequence[str], sums: Ring) -> bytes:
        """The result for all parties."""
        head = (binding + self.write_set(survivors)).ljust(self.result_head, b"\0")
        return b"".join((head, sums.data.cast("B")))

    def read_result(self, result: bytes, binding: bytes, survivors: Sequence[str]) -> Ring:
        """The numbers of a result; a view of it, uint32 [d + 6].

        Raises:
            WireError: another length, round, attempt or set of survivors.
        """
        if len(result) != self.result_bytes:
            raise WireError(
                f"The coordinator sent a result of {len(result)} bytes.", expected=f"{self.result_bytes} bytes"
            )
        if result[:KEY] != binding:
            raise WireError("The coordinator sent the result of another round, attempt or way of summing.")
        if self.read_set(result[KEY : KEY + self.set_bytes]) != tuple(survivors):
            raise WireError("The coordinator's result is over other survivors than those that this party agreed to.")
        return np.frombuffer(result, dtype="<u4", offset=self.result_head)


def numbers_tag(key: bytes, numbers: memoryview) -> bytes:
    """32 bytes that change with any change of `numbers`, except for who knows the key; see above."""
    cipher = AESGCM(key)
    starts = range(0, len(numbers), _TAGGED)
    return digest(*(cipher.encrypt(at.to_bytes(12, "little"), b"", numbers[at : at + _TAGGED]) for at in starts))


def roster_digest(binding: bytes, adverts: Mapping[str, bytes]) -> bytes:
    """32 bytes that stand for everybody's advert: goes into every key that is made from them."""
    pairs = (part for party in sorted(adverts) for part in (party.encode("ascii"), adverts[party]))
    return digest(b"splitfl roster 1", binding, *pairs)


def share_bound(roster: bytes, sender: str, receiver: str) -> bytes:
    """What a sealed share is bound to."""
    return digest(b"splitfl share 1", roster, sender.encode("ascii"), receiver.encode("ascii"))


def mask_info(roster: bytes, one: str, other: str) -> bytes:
    """What the mask between two parties is for; the same in both orders."""
    first, second = sorted((one, other))
    return digest(b"splitfl pair mask 1", roster, first.encode("ascii"), second.encode("ascii"))


def agreement_hash(
    layout: Layout, group: tuple[bytes, Sequence[str], Sequence[str]], survivors: Sequence[str]
) -> bytes:
    """What an agreement signs."""
    roster, advertised, shared = group
    sets = (layout.write_set(members) for members in (advertised, shared, survivors))
    return hashlib.sha256(digest(b"splitfl survivors 1", roster, *sets)).digest()


def threshold(roster: int, least: int) -> int:
    """How many must come together to open a sum, of so many who advertised.

    More than two thirds. With t shares needed, a coordinator that tells two halves of the parties two survivor sets,
    and c parties that collude with it, learn an update only if roster + c >= 2 t; so c may be a third of the parties.
    """
    return max(least, 2 * roster // 3 + 1)


def name_all(parties: Iterable[str]) -> str:
    """Parties, in a message."""
    return ", ".join(short(party) for party in parties) or "nobody"
