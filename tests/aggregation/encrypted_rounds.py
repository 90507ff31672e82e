"""Rounds of encrypted sums with real keys and a real worker process, in one test process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitfl.aggregation.bfv import BfvSealer, BfvSummer
from splitfl.aggregation.ckks import CkksSealer, CkksSummer
from splitfl.aggregation.encrypted import EncryptedSealer, EncryptedSummer
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.identity import Identities, signing_key
from splitfl.aggregation.lattice import Form
from splitfl.aggregation.noise import NoisePlan
from splitfl.aggregation.noiser import Noiser
from splitfl.aggregation.sums import RoundTerms, Vector
from splitfl.wire.channel import curve_keypair
from splitfl.wire.keys import KeyPair

CLASSES: dict[str, tuple[type[EncryptedSealer], type[EncryptedSummer]]] = {
    "bfv": (BfvSealer, BfvSummer),
    "ckks": (CkksSealer, CkksSummer),
}
KINDS = [(scheme, form) for scheme in CLASSES for form in ("seeded", "public")]


def key_pairs(count: int) -> list[KeyPair]:
    """CURVE pairs, in the order of their public keys."""
    return sorted((curve_keypair() for _ in range(count)), key=lambda keys: keys.public)


def identities_of(pairs: list[KeyPair]) -> Identities:
    return {keys.public.decode(): signing_key(keys).public_key() for keys in pairs}


def terms_of(pairs: list[KeyPair], **changes: object) -> RoundTerms:
    settings: dict[str, object] = {
        "federation": "ab" * 16,
        "round": 3,
        "attempt": 0,
        "parties": tuple(keys.public.decode() for keys in pairs),
        "length": 50,
        "clip": 0.5,
        "max_weight": 1000.0,
        "layout": "cd" * 32,
    }
    return RoundTerms(**{**settings, **changes})  # type: ignore[arg-type]


def updates_of(count: int, length: int, seed: int = 0, scale: float = 0.1) -> list[Vector]:
    generator = np.random.default_rng(seed)
    return [generator.normal(0, scale, length).astype(np.float32) for _ in range(count)]


@dataclass
class Round:
    """One attempt, walked stage by stage; `messages` is all that the coordinator ever saw."""

    pairs: list[KeyPair]
    worker: Worker
    scheme: str = "bfv"
    form: Form = "seeded"
    changes: dict[str, object] = field(default_factory=dict)
    allow_two: bool = False
    plan: Callable[[RoundTerms], NoisePlan] | None = None
    """Of the noise on the sum; with a folder for what each party keeps of it."""
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.terms = terms_of(self.pairs, **self.changes)
        self.identities = identities_of(self.pairs)
        sealer, summer = CLASSES[self.scheme]
        noise = self.plan(self.terms) if self.plan is not None else None
        self.sealers = {
            keys.public.decode(): sealer(
                self.terms, keys, self.identities, form=self.form, worker=self.worker, allow_two=self.allow_two,
                noise=noise, noiser=None if self.folder is None else Noiser(self.folder / str(place)),
            )
            for place, keys in enumerate(self.pairs)
        }  # fmt: skip
        self.summer = summer(self.terms, self.identities, form=self.form, noise=noise)
        self.messages: list[bytes] = []
        self.adverts: dict[str, bytes] = {}
        self.shares: dict[str, dict[str, bytes]] = {}

    def agree_on_key(self, advertising: list[str] | None = None, sharing: list[str] | None = None) -> None:
        """The first two stages, by those who are still there."""
        self.adverts = {party: self.sealers[party].advertise() for party in advertising or self.sealers}
        sharing = sharing or list(self.adverts)
        self.shares = {party: dict(self.sealers[party].share(self.adverts)) for party in sharing}
        self.messages += self.adverts.values()
        self.messages += [blob for blobs in self.shares.values() for blob in blobs.values()]

    def shares_for(self, party: str) -> dict[str, bytes]:
        return {sender: blobs[party] for sender, blobs in self.shares.items() if sender != party}

    def submission(self, party: str, vector: Vector, weight: float = 1.0) -> bytes:
        blob = self.sealers[party].submit(vector, weight, self.adverts, self.shares_for(party))
        self.messages.append(blob)
        return blob

    def submit(self, party: str, vector: Vector, weight: float = 1.0) -> None:
        self.summer.accept(party, self.submission(party, vector, weight))

    def run(self, vectors: list[Vector], weights: list[float]) -> bytes:
        """All stages, nobody missing; the result."""
        self.agree_on_key()
        for party, vector, weight in zip(self.sealers, vectors, weights, strict=True):
            self.submit(party, vector, weight)
        return self.summer.finish({})


def plain_mean(vectors: list[Vector], weights: list[float], clip: float) -> np.ndarray:
    clipped = [np.clip(vector.astype(np.float64), -clip, clip) for vector in vectors]
    return np.average(np.stack(clipped), axis=0, weights=weights)
