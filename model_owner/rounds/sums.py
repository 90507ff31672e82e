"""The coordinator's side of each way of summing, by name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from model_owner.rounds.engine import SummerFactory
from model_owner.rounds.logit_sum import logit_summer
from splitfl.aggregation.logits import RULE as KD
from splitfl.aggregation.noise import NoisePlan
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.sums import RoundTerms, Stage, Summer
from splitfl.errors import PeerError
from splitfl.rounds.schedule import place_of
from splitfl.rounds.sizes import update_bytes
from splitfl.rounds.together import Combiner
from splitfl.wire.round_frames import pack_parts
from splitfl.wire.round_messages import SumName

_WEIGHT = struct.Struct("<d")
Planned = Callable[[RoundTerms], NoisePlan | None]


def stages_of(name: SumName) -> tuple[Stage, ...]:
    """The stages that a way of summing walks through."""
    match name:
        case "plain":
            from splitfl.aggregation.plain import PlainSealer

            return PlainSealer.stages
        case "mask" | "mask+hidden":
            from splitfl.aggregation.masks import MaskSealer

            return MaskSealer.stages
        case "bfv" | "ckks":
            from splitfl.aggregation.encrypted import EncryptedSealer

            return EncryptedSealer.stages


def no_noise(terms: RoundTerms) -> None:
    """The plan of a round whose sum is not noised."""


def summer_factory(name: SumName, rule: Rule, parties: Path, planned: Planned = no_noise) -> SummerFactory:
    """What makes the coordinator's side of one attempt.

    Args:
        name: the way of summing.
        rule: of the federation; in rounds for which a mean is not enough, every update goes to every party as it is.
        parties: the allow-list, whose files also hold the parties' signing keys.
        planned: the noise that the parties add to the sum of a round.
    """

    def make(terms: RoundTerms) -> Summer:
        if name == "plain" and rule.name == KD:
            return logit_summer(terms)
        if name == "plain" and not rule.by_mean(place_of(rule, terms.round)[0]):
            return Combiner(terms, _relay, check=_check_size, max_bytes=update_bytes(name, terms.length))
        return _summer(name, terms, parties, planned(terms))

    return make


def _summer(name: SumName, terms: RoundTerms, parties: Path, noise: NoisePlan | None) -> Summer:
    if name == "plain":
        from splitfl.aggregation.plain import PlainSummer

        return PlainSummer(terms)
    from splitfl.aggregation.identity import load_identities

    # Here the channel proves who sent what, and parties check each other's signatures themselves; checking those of
    # masked updates once more would cost as much again as adding them.
    if name in ("mask", "mask+hidden"):
        from splitfl.aggregation.hidden import HiddenSummer
        from splitfl.aggregation.mask_sums import MaskSummer

        return (MaskSummer if name == "mask" else HiddenSummer)(terms, noise=noise, allow_two=noise is not None)
    identities = load_identities(parties)
    if name == "bfv":
        from splitfl.aggregation.bfv import BfvSummer

        return BfvSummer(terms, identities, noise=noise)
    from splitfl.aggregation.ckks import CkksSummer

    return CkksSummer(terms, identities, noise=noise)


def _relay(terms: RoundTerms, updates: Mapping[str, bytes]) -> bytes:
    """Every update to every party: each combines them by the rule, and all come to the same state."""
    return pack_parts(updates)


def _check_size(terms: RoundTerms, party: str, update: bytes) -> None:
    """A weight and at most `length` values; what they mean is the rule's business, at the parties."""
    if not _WEIGHT.size < len(update) <= _WEIGHT.size + 4 * terms.length:
        raise PeerError(
            f"An update of {len(update)} bytes came.", expected=f"at most {_WEIGHT.size + 4 * terms.length}"
        )
