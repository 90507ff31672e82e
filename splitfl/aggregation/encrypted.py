"""Encrypted sums: the parties hold one secret key, the coordinator none, and it never sees an opened sum.

    party         update -> whole numbers on a grid -> tags -> ciphertexts under the group's key -> signature
    coordinator   size, sender, signature, range of every word; then word + word modulo a prime. Keeps one sum
    party         opens the sum, checks that it is the sum of the parties that the result names, each once

The coordinator runs no native code and holds no parameter, public key or context that came from anywhere: it needs the
terms of the round and the parties' signing keys. `bfv` and `ckks` differ in what is inside the ciphertexts.

What a coordinator that breaks the rules can reach: that a round fails. A sum with an update left out, counted twice,
taken from another round, or with anything added does not open (`tags`); that it did not is one bit a round, and the
next attempt has another key. What it reaches together with one party: every update, because the parties share the key.
Where that matters, use `mask`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NoReturn

import numpy as np

from splitfl.aggregation.grid import EXTRA, Grid, check_vector
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.identity import Identities, identity_of, short, signing_key
from splitfl.aggregation.keywrap import NAME_BYTES, GroupSecret, KeyAgreement
from splitfl.aggregation.lattice import (
    PLAIN_MODULUS,
    Form,
    RunningSum,
    Scheme,
    read_words,
    seeds_size,
    words_size,
)
from splitfl.aggregation.noise import NoisePlan, space_of
from splitfl.aggregation.noiser import Noiser
from splitfl.aggregation.sealed import KEY, SIGNATURE, check_terms, signed, terms_digest, unsigned
from splitfl.aggregation.sums import Opened, RoundTerms, Stage, Vector
from splitfl.aggregation.tags import LIMBS, fits, tag
from splitfl.errors import InternalError, UsageError, WireError
from splitfl.wire.keys import KeyPair

FEWEST = 3
"""Parties below which a sum tells each party too much about the others; with two, the other's update."""


@dataclass(frozen=True)
class Shape:
    """Sizes of everything in a round that is summed encrypted. Both sides compute it from the terms alone.

    Args:
        terms: of the round.
        scheme: what is inside the ciphertexts.
        form: how they travel.
        noise: what makes the sum differentially private.

    Raises:
        UsageError: terms that cannot be; noise for other terms.
    """

    terms: RoundTerms
    scheme: Scheme
    form: Form
    noise: NoisePlan | None = None

    def __post_init__(self) -> None:
        check_terms(self.terms)
        if self.noise is not None:
            self.noise.check(self.terms, space_of(self.scheme.name))

    @property
    def enough(self) -> int:
        """Fewest parties in a sum, as far as the noise says."""
        return self.noise.enough if self.noise is not None else 1

    @property
    def parties(self) -> int:
        """How many may take part."""
        return len(self.terms.parties)

    @cached_property
    def grid(self) -> Grid:
        """Where the values of an update may lie: as fine as the scheme allows for a full sum and the noise on it."""
        if self.noise is not None:
            return self.noise.grid(self.terms.max_weight)
        whole = min(self.scheme.largest, self.parties * self.scheme.finest)
        return Grid(clip=self.terms.clip, parties=self.parties, max_weight=self.terms.max_weight, modulus=2 * whole + 1)

    @property
    def values(self) -> int:
        """Whole numbers that are encrypted: the update, its weight, what `Grid` checks, and the tags."""
        return self.terms.length + EXTRA + LIMBS

    @property
    def seeds(self) -> int:
        """Bytes of one update's seeds."""
        return seeds_size(self.scheme.blocks(self.values), self.form)

    @property
    def words(self) -> int:
        """Bytes of one update's words, and of a sum's."""
        return words_size(self.scheme.blocks(self.values), self.form)

    @property
    def submission(self) -> int:
        """Bytes of what a party submits."""
        return NAME_BYTES + self.seeds + self.words + SIGNATURE

    @property
    def roll(self) -> int:
        """Bytes of the list of survivors: one bit for each party of the round, in order."""
        return -(-self.parties // 8)

    @cached_property
    def binding(self) -> bytes:
        """32 bytes that go into every key and signature of the attempt."""
        parameters = f"{self.scheme.name} {self.form} 8192 60+60 {PLAIN_MODULUS} {self.grid.levels}".encode("ascii")
        noise = [self.noise.descriptor()] if self.noise is not None else []
        return terms_digest(self.terms, b"splitfl encrypted sum 1", parameters, *noise)


class EncryptedSealer:
    """A party's side; see `sums.Sealer`. `BfvSealer` and `CkksSealer` say which scheme.

    Args:
        terms: of the round.
        keys: of this party.
        identities: pinned signing keys of the other parties, by public key.
        form: what travels: ``seeded`` is half as long; ``public`` opens in the same time for any number of parties.
        worker: the process that encrypts and opens; without one, each call starts its own and ends it.
        allow_two: take part in sums of two, where each can tell the other's; only if the updates carry noise.
        noise: of which this party adds its share; the same at all parties and the coordinator.
        noiser: keeps the noised update between the attempts of a round; needed where `noise` is given.

    Raises:
        UsageError: terms that cannot be, this party is not in them, or noise for other terms.
    """

    stages: ClassVar[tuple[Stage, ...]] = ("advertise", "share", "submit")
    scheme: ClassVar[Scheme]

    def __init__(
        self,
        terms: RoundTerms,
        keys: KeyPair,
        identities: Identities,
        *,
        form: Form = "seeded",
        worker: Worker | None = None,
        allow_two: bool = False,
        noise: NoisePlan | None = None,
        noiser: Noiser | None = None,
    ) -> None:
        self._shape = Shape(terms, self.scheme, form, noise)
        if noise is not None and noiser is None:
            raise UsageError("Noise without a place to keep it.", expected="a Noiser that outlives the attempt")
        self._noiser = noiser
        self._party = keys.public.decode("ascii")
        if self._party not in terms.parties:
            raise UsageError("This party's key is not among those of the round.", expected="a party of the round")
        self._identity = signing_key(keys)
        self._agreement = KeyAgreement(self._shape.binding, keys, identities, terms.parties)
        self._worker = worker
        self._fewest = max(2 if allow_two else FEWEST, self._shape.enough)
        self._secret: GroupSecret | None = None
        self._submitted = b""
        self._result = b""

    def advertise(self) -> bytes:
        """See `sums.Sealer`."""
        return self._agreement.advertise()

    def share(self, adverts: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """See `sums.Sealer`.

        Raises:
            WireError: an advert that its party did not send, or too few parties.
        """
        self._need(len(adverts))
        return self._agreement.share(adverts)

    def submit(self, vector: Vector, weight: float, adverts: Mapping[str, bytes], shares: Mapping[str, bytes]) -> bytes:
        """See `sums.Sealer`. A second call answers with the same bytes, whatever it is given.

        Raises:
            DataError: values that are not finite, or a weight out of range.
            ResourceError: it could not be encrypted.
            WireError: an advert or a share that its party did not send, or too few parties.
        """
        if self._submitted:
            return self._submitted
        shape = self._shape
        if self._noiser is not None and self._noiser.was_opened(shape.terms):
            raise WireError(
                "A sum of this round was opened in an earlier attempt; with the same noise on another one, the "
                "difference could show single updates.",
                hint="the round is dropped here",
            )
        check_vector(vector, shape.terms.length)
        self._need(len(shares) + 1)
        secret = self._agreement.secret(adverts, shares)
        values = np.empty(shape.values, dtype=np.int32)
        update = values[:-LIMBS]
        if shape.noise is None or self._noiser is None:
            shape.grid.encode(vector, weight, update)
        else:
            self._noiser.encode(shape.terms, shape.grid, shape.noise, vector, weight, update)
        values[-LIMBS:] = tag(secret.tags, self._party, update)
        with self._working() as worker:
            blob = worker.encrypt(self.scheme, shape.form, secret.key, values)
        self._secret = secret
        self._submitted = signed(self._identity, b"update", shape.binding, self._party, secret.name + blob)
        return self._submitted

    def agree(self, survivors: Sequence[str]) -> bytes:
        """Not a stage of this way of summing: the tags of the sum say who is in it."""
        _left_out("agree")

    def reveal(self, survivors: Sequence[str], agreements: Mapping[str, bytes]) -> bytes:
        """Not a stage of this way of summing: parties open the sum, each for itself."""
        _left_out("reveal")

    def open(self, result: bytes) -> Opened:
        """See `sums.Sealer`. Opens one result, and no other one after it.

        Raises:
            WireError: it is not the sum of the updates of the parties that it names, or of too few; nothing was
                submitted here.
        """
        if self._secret is None:
            raise WireError("A result came before this party had submitted an update.", hint="take the next round")
        told = hashlib.sha256(result).digest()
        if self._result and self._result != told:
            raise WireError("A second, different result came for one attempt.", expected="one result")
        survivors, seeds, words = self._read(result)
        self._need(len(survivors))
        # From here on the key is used on it. What does not open must not be tried in variations.
        self._result = told
        shape = self._shape
        if self._noiser is not None:
            self._noiser.note_opened(shape.terms, survivors)
        with self._working() as worker:
            sums = worker.open(self.scheme, shape.form, self._secret.key, shape.values, seeds, words)
        update, limbs = sums[:-LIMBS], sums[-LIMBS:]
        if not fits(self._secret.tags, survivors, update, limbs):
            raise WireError(
                f"What was opened is not the sum of the updates of these {len(survivors)} parties.",
                expected="tags that add up to those of the parties that the coordinator named",
                hint="the round is dropped; a party or the coordinator did not do its part",
            )
        mean, weight = shape.grid.decode(update, len(survivors))
        return Opened(mean=mean, weight=weight, parties=len(survivors))

    def _read(self, result: bytes) -> tuple[list[str], list[memoryview], memoryview]:
        """Survivors, the seeds of each, and the words of the sum."""
        shape, view = self._shape, memoryview(result)
        head = KEY + shape.roll
        roll = int.from_bytes(view[KEY:head], "little")
        each = shape.seeds if shape.form == "seeded" else 0
        if len(view) != head + roll.bit_count() * each + shape.words or roll >> shape.parties or not roll:
            raise WireError(
                f"The result of the round has {len(view)} bytes.",
                expected=f"{head + shape.words} bytes and {each} for each party in the sum",
            )
        if view[:KEY] != shape.binding:
            raise WireError("The result is one of another round or attempt.", expected="this round's")
        survivors = [party for place, party in enumerate(shape.terms.parties) if roll >> place & 1]
        seeds = [view[head + i * each : head + (i + 1) * each] for i in range(len(survivors))] if each else []
        return survivors, seeds, view[len(view) - shape.words :]

    def _need(self, parties: int) -> None:
        if parties < self._fewest:
            raise WireError(
                f"The round has {parties} parties in its sum.",
                expected=f"at least {self._fewest}: with fewer a sum tells too much about each of them",
                hint="wait for more parties, or add noise to the updates",
            )

    def _working(self) -> Borrowed:
        return Borrowed(self._worker)


class Borrowed:
    """A worker for one call: the one that is there, or one that ends with the call."""

    def __init__(self, there: Worker | None) -> None:
        self._there = there
        self._own: Worker | None = None

    def __enter__(self) -> Worker:
        if self._there is not None:
            return self._there
        self._own = Worker()
        return self._own

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.close()


class EncryptedSummer:
    """The coordinator's side; see `sums.Summer`. `BfvSummer` and `CkksSummer` say which scheme.

    Args:
        terms: of the round.
        identities: signing keys of the parties of the round, by public key; None where the channel alone vouches for
            who sent what. Parties do not rely on it: the tags in the sum tell them who is in it.
        form: as the parties have it.
        noise: as the parties have it.

    Raises:
        UsageError: terms that cannot be, or noise for other terms.
    """

    opens: ClassVar[bool] = False
    scheme: ClassVar[Scheme]

    def __init__(
        self,
        terms: RoundTerms,
        identities: Identities | None,
        *,
        form: Form = "seeded",
        noise: NoisePlan | None = None,
    ) -> None:
        self._shape = Shape(terms, self.scheme, form, noise)
        self._identities = identities
        self._sum = RunningSum(self.scheme.blocks(self._shape.values), form)
        self._seeds: dict[str, bytes] = {}
        self._secret_name = b""

    def accept(self, party: str, blob: bytes) -> None:
        """See `sums.Summer`.

        Raises:
            WireError: as there; also an update under another secret than that of the first one.
        """
        shape = self._shape
        if party not in shape.terms.parties:
            raise WireError(f"An update came from {short(party)}.", expected="a party of the round")
        if party in self._seeds:
            raise WireError(f"A second update came from party {short(party)}.", expected="one update a round")
        identity = None if self._identities is None else identity_of(self._identities, party)
        body = unsigned(identity, blob, shape.submission - SIGNATURE, b"update", shape.binding, party)
        name = bytes(body[:NAME_BYTES])
        if self._secret_name and name != self._secret_name:
            raise WireError(
                f"The update of party {short(party)} is encrypted under another secret than those before it.",
                expected="the secret that all parties of the attempt agreed on",
                hint="one of the parties was told of other parties than the rest: begin a new attempt",
            )
        split = NAME_BYTES + shape.seeds
        words = read_words(body[split:], self.scheme.blocks(shape.values), shape.form)
        self._secret_name = name
        self._sum.add(words)
        self._seeds[party] = bytes(body[NAME_BYTES:split])

    @property
    def survivors(self) -> tuple[str, ...]:
        """See `sums.Summer`."""
        return tuple(sorted(self._seeds))

    def finish(self, reveals: Mapping[str, bytes]) -> bytes:
        """See `sums.Summer`; needs no `reveals`.

        Raises:
            WireError: there is no update in the sum, or there are fewer than the noise on it was planned for.
        """
        survivors = self.survivors
        if len(survivors) < self._shape.enough:
            raise WireError(
                f"{len(survivors) or 'No'} update{'s' * (len(survivors) > 1)} came in.",
                expected=f"at least {self._shape.enough}",
                hint="begin a new attempt",
            )
        roll = sum(1 << place for place, party in enumerate(self._shape.terms.parties) if party in self._seeds)
        head = self._shape.binding + roll.to_bytes(self._shape.roll, "little")
        return b"".join([head, *(self._seeds[party] for party in survivors), self._sum.words()])

    def open(self, result: bytes) -> Opened:
        """Never: the coordinator has no key.

        Raises:
            InternalError: always.
        """
        raise InternalError("An encrypted sum is opened by the parties; the coordinator has no key for it.")


def _left_out(stage: Stage) -> NoReturn:
    raise InternalError(f"Encrypted sums have no stage {stage!r}.")
