"""Which sum of a federation belongs to which round of its rule: a rule may need several sums a round.

On the wire every sum is a round of its own, with the next number; parties leave scores out where the rule's round is
not over.
"""

from __future__ import annotations

from splitfl.aggregation.rule import Rule


def sums_in(rule: Rule, rounds: int) -> int:
    """How many sums `rounds` rounds of the rule are."""
    return sum(len(rule.steps(number)) for number in range(rounds))


def place_of(rule: Rule, number: int) -> tuple[int, int]:
    """The rule's round, and the step in it, of sum `number`."""
    round_ = 0
    while number >= len(rule.steps(round_)):
        number -= len(rule.steps(round_))
        round_ += 1
    return round_, number
