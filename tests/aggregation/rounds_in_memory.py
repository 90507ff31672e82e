"""Rounds of parties and a coordinator in one process: the stages, with any of the parties leaving at any of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from splitfl.aggregation.identity import signing_key
from splitfl.aggregation.sums import RoundTerms, Sealer, Summer
from splitfl.wire.channel import curve_keypair
from splitfl.wire.keys import KeyPair

STAGES = ("advertise", "share", "submit", "agree", "reveal")


@lru_cache(maxsize=1)
def pairs() -> tuple[KeyPair, ...]:
    """Key pairs of many parties, in the order of their public keys."""
    return tuple(sorted((curve_keypair() for _ in range(50)), key=lambda keys: keys.public))


def identities(count: int) -> dict[str, object]:
    return {keys.public.decode(): signing_key(keys).public_key() for keys in pairs()[:count]}


def terms_of(parties: int, length: int = 20, **changes) -> RoundTerms:
    values = {
        "federation": "0" * 32, "round": 0, "attempt": 0, "length": length, "clip": 0.5, "max_weight": 1000.0,
        "layout": "a layout", "parties": tuple(keys.public.decode() for keys in pairs()[:parties]),
    }  # fmt: skip
    return RoundTerms(**(values | changes))


def updates(parties: int, length: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.1, length).astype(np.float32) for _ in range(parties)]


@dataclass
class Round:
    """What was said in a round, and who is left of it."""

    sealers: dict[str, Sealer]
    summer: Summer
    adverts: dict[str, bytes] = field(default_factory=dict)
    shares: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    agreements: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, bytes] = field(default_factory=dict)
    result: bytes = b""

    def inbox(self, party: str) -> dict[str, bytes]:
        """The blobs that the others made for this party."""
        return {sender: blobs[party] for sender, blobs in self.shares.items() if sender != party}

    def run(
        self,
        vectors: Sequence[np.ndarray],
        weights: Sequence[float],
        leave: Mapping[str, Collection[int]] | None = None,
        order: Sequence[int] | None = None,
        until: str = "result",
    ) -> Round:
        """Walk the stages; `leave` says who (by place) is gone before which of them."""
        parties = list(self.sealers)
        here = {party: self.sealers[party] for party in (parties[place] for place in order or range(len(parties)))}

        def gone(stage: str) -> None:
            for place in (leave or {}).get(stage, ()):
                here.pop(parties[place], None)

        gone("advertise")
        self.adverts = {party: sealer.advertise() for party, sealer in here.items()}
        gone("share")
        self.shares = {party: sealer.share(self.adverts) for party, sealer in here.items()}
        gone("submit")
        if until == "submit":
            return self
        for party, sealer in here.items():
            place = parties.index(party)
            self.blobs[party] = sealer.submit(vectors[place], weights[place], self.adverts, self.inbox(party))
            self.summer.accept(party, self.blobs[party])
        survivors = self.summer.survivors
        gone("agree")
        if until == "agree":
            return self
        self.agreements = {party: sealer.agree(survivors) for party, sealer in here.items()}
        gone("reveal")
        if until == "reveal":
            return self
        self.reveals = {party: sealer.reveal(survivors, self.agreements) for party, sealer in here.items()}
        gone("result")
        if until == "finish":
            return self
        self.result = self.summer.finish(self.reveals)
        return self
