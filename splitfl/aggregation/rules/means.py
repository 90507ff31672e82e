"""Rules that are a weighted mean of factors: the sum is all they need."""

from __future__ import annotations

from dataclasses import dataclass

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.rule import Rule, Step
from splitfl.aggregation.state import State

ROW_BY_ROW = "factors are averaged value by value"


@dataclass(frozen=True, kw_only=True)
class FedIT(Rule):
    """A = sum w A_k, B = sum w B_k. The product is off by the weighted covariance of the two factors."""

    name = "fedit"
    source = "Shepherd (Zhang et al., 2305.05644); FedAvg of the factors"
    says = "means of A and of B"
    linear = True
    same_bits = True
    one_rank = ROW_BY_ROW


@dataclass(frozen=True, kw_only=True)
class FFA(Rule):
    """B = sum w B_k; A stays as drawn. Exact, as all share A; but nothing outside the rows of A can be learnt."""

    name = "ffa"
    source = "FFA-LoRA (Sun et al., 2403.12313)"
    says = "mean of B; A stays as drawn"
    exact = True
    linear = True
    same_bits = True
    one_rank = ROW_BY_ROW

    def steps(self, round: int) -> tuple[Step, ...]:
        """B alone."""
        return (Step(trains="B", sends="B"),)


@dataclass(frozen=True, kw_only=True)
class RoLoRA(Rule):
    """Even rounds B, odd rounds A; the other is frozen and everybody's, so each round is exact."""

    name = "rolora"
    source = "RoLoRA (Chen et al., 2502.01755)"
    says = "mean of B in even rounds, of A in odd ones; the other is frozen"
    exact = True
    linear = True
    same_bits = True
    one_rank = ROW_BY_ROW

    def steps(self, round: int) -> tuple[Step, ...]:
        """B, then A."""
        return (Step(trains="B", sends="B"),) if round % 2 == 0 else (Step(trains="A", sends="A"),)


@dataclass(frozen=True, kw_only=True)
class FedSA(Rule):
    """A = sum w A_k; B and what is tuned whole stay at each party."""

    name = "fedsa"
    source = "FedSA-LoRA (Guo et al., 2410.01463)"
    says = "mean of A; B and head stay at home"
    linear = True
    same_bits = True
    one_rank = ROW_BY_ROW
    no_global = "every party keeps a B and a head of its own"

    def steps(self, round: int) -> tuple[Step, ...]:
        """Both are trained, A is sent."""
        return (Step(trains="both", sends="A", extras=False),)

    def start(
        self, state: State, round: int, step: int = 0, *, own: Update | None = None, rank: int | None = None
    ) -> Update:
        """The shared A with the party's own B and head; a party that has none yet takes those of the first state."""
        shared = super().start(state, round, step, rank=rank)
        if own is None:
            return shared

        def joined(name: str, pair: Pair) -> Pair:
            return Pair(pair.a, own.pairs[name].at_scale(pair.scale).b, pair.scale)

        return shared.map(joined, own.extras)
