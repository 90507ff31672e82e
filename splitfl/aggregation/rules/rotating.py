"""`fedsvd`: the mean of B, and afterwards a new A with orthonormal rows for the same product."""

from __future__ import annotations

from dataclasses import dataclass, replace

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.low_rank import best
from splitfl.aggregation.rule import Rule, Step
from splitfl.aggregation.rules.cores import check_orthonormal
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import Vector


@dataclass(frozen=True, kw_only=True)
class FedSVD(Rule):
    """B = sum w B_k; U S V^T = B A; then A = V^T and B = U S.

    The product stays what it is, so the rule is exact. The rows of the new A are orthonormal, which keeps noise added
    to B the same in every direction. They span what the first A spanned and nothing else: as with ffa, nothing outside
    of it can be learnt.
    """

    name = "fedsvd"
    source = "FedSVD (Lee et al., 2505.12805)"
    says = "mean of B, then B and A are rewritten with orthonormal rows of A"
    exact = True
    one_rank = "factors are averaged value by value"

    def first(self, template: Update, seed: int) -> State:
        """As for every rule, where the rank allows orthonormal rows."""
        for name, pair in template.pairs.items():
            check_orthonormal(self.name, name, pair)
        return super().first(template, seed)

    def steps(self, round: int) -> tuple[Step, ...]:
        """B alone."""
        return (Step(trains="B", sends="B"),)

    def from_mean(self, state: State, mean: Vector, round: int, step: int = 0) -> State:
        """The mean of B, rewritten."""
        averaged = super().from_mean(state, mean, round, step)

        def rewritten(_: str, pair: Pair) -> Pair:
            balanced = best([pair], [1.0], pair.rank, pair.scale)
            length = balanced.a.double().norm(dim=1)
            a = (balanced.a.double() / length[:, None]).float()
            return Pair(a, (balanced.b.double() * length).float(), pair.scale)

        return replace(averaged, adapter=averaged.adapter.map(rewritten))
