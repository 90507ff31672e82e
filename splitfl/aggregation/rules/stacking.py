"""Rules that keep the mean of the products whole, by adding to the base weights what does not fit an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.low_rank import best, stacked
from splitfl.aggregation.rule import IN_THE_CLEAR, Rule, mean_extras, mean_tensor, shares
from splitfl.aggregation.state import State, fresh_pair
from splitfl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FLoRA(Rule):
    """A = [A_1; ...; A_n], B = [w_1 s_1 B_1 ... w_n s_n B_n], added to the base weights; the adapter begins anew.

    The weight goes on one factor, once. The fresh A is drawn from the seed and the number of the round.
    """

    name = "flora"
    source = "FLoRA (Wang et al., 2409.05976)"
    says = "stacks all factors and adds the product to the base weights; the adapter begins anew"
    exact = True
    needs_all = IN_THE_CLEAR
    no_dp = "both factors carry noise, their product is kept for good, and the adapter has to begin anew each round"

    def from_all(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
    ) -> State:
        """The change goes to `State.merged`."""
        parts = shares(weights)
        mean = {name: stacked([update.pairs[name] for update in updates], parts) for name in state.adapter.pairs}
        fresh = state.adapter.map(
            lambda name, pair: fresh_pair(pair, state.seed, name, draw=round + 1), mean_extras(updates, weights)
        )
        return replace(state, adapter=fresh, merged=state.merging(mean))


@dataclass(frozen=True, kw_only=True)
class FedEx(Rule):
    """A, B as in fedit, and what their product misses is added to the base weights.

    The missing part sum w B_k A_k - B A equals sum w (B_k - B) (A_k - A_n) over all k but the last, n: as the weighted
    deviations of B add up to nothing, any one A may be subtracted. So its rank is at most (n - 1) r and no product is
    formed; of one party alone it is nothing. `keep` cuts it to that rank, as the paper does to send less.
    """

    name = "fedex"
    source = "FedEx-LoRA (Singhal et al., 2410.09432)"
    says = "means of A and B, and what their product misses is added to the base weights"
    exact = True
    needs_all = IN_THE_CLEAR
    one_rank = "factors are averaged value by value"
    no_dp = "what the means miss is made of products of noise, and goes into the base weights"

    keep: int = 0
    """Rank to which the missing part is cut, 0: not at all. Cut, the rule is no longer exact."""

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise UsageError(f"keep={self.keep} is no rank.", expected="0 (everything) or more")

    def from_all(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
    ) -> State:
        """The missing part goes to `State.merged`."""
        parts = shares(weights)
        pairs, missing = {}, {}
        for name, old in state.adapter.pairs.items():
            own = [update.pairs[name].at_scale(old.scale) for update in updates]
            mean = Pair(mean_tensor([p.a for p in own], weights), mean_tensor([p.b for p in own], weights), old.scale)
            pairs[name] = mean
            if len(own) > 1:
                missing[name] = self._missing(own, mean, parts)
        adapter = Update(pairs, mean_extras(updates, weights))
        return replace(state, adapter=adapter, merged=state.merging(missing))

    def _missing(self, own: Sequence[Pair], mean: Pair, parts: Sequence[float]) -> Pair:
        last, b_mean = own[-1].a.double(), mean.b.double()
        deviations = [
            Pair((p.a.double() - last).float(), (p.b.double() - b_mean).float(), mean.scale) for p in own[:-1]
        ]
        if self.keep:
            return best(deviations, parts[:-1], self.keep, mean.scale)
        return stacked(deviations, parts[:-1])
