"""The coordinator's part in `fed-kd`: it averages what the parties say, so that none of them sees another's."""

from __future__ import annotations

from splitfl.aggregation.logits import RULE, Distilled, check_sum, check_upload, combine_uploads
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.rules import rule_named
from splitfl.aggregation.sums import RoundTerms, Summer
from splitfl.rounds.sizes import update_bytes
from splitfl.rounds.together import Combiner
from splitfl.wire.round_messages import SumName


def round_rule(name: str, summation: SumName) -> Rule:
    """What a federation's rounds do: a rule of combining adapters, or the mean of logits.

    Raises:
        UsageError: no such rule, or one that this sum cannot be used with.
    """
    if name != RULE:
        return rule_named(name)
    check_sum(summation)
    return Distilled()


def logit_summer(terms: RoundTerms) -> Summer:
    """The coordinator's side of one attempt where it reads every upload; its memory is all of them together."""
    return Combiner(terms, combine_uploads, check=check_upload, max_bytes=update_bytes("plain", terms.length))
