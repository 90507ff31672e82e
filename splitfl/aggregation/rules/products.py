"""Rules that go back from the mean of the products to one adapter: the best of its rank, or the best B for mean A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.low_rank import best
from splitfl.aggregation.rule import IN_THE_CLEAR, Rule, Step, mean_extras, mean_tensor, shares
from splitfl.aggregation.state import State, fresh_factor
from splitfl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Rule):
    """U S V^T = sum w s B_k A_k, cut to the rank of the federation; B = U S^1/2, A = S^1/2 V^T.

    By QR of the stacked factors and the singular values of the small matrix between them. A party of lower rank gets
    the strongest directions, by the same means. One update alone that has the federation's rank already is the best
    approximation of itself and is kept, bits and all.
    """

    name = "flexlora"
    source = "FlexLoRA (Bai et al., 2402.11505)"
    says = "best adapter of the federation's rank to the mean of the products"
    needs_all = IN_THE_CLEAR

    rank: int = 0
    """Of the aggregate; 0: that of the state."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UsageError(f"rank={self.rank} is no rank.", expected="0 (that of the federation) or more")

    def first(self, template: Update, seed: int) -> State:
        """With the rank of the aggregate from the start."""

        def begun(name: str, pair: Pair) -> Pair:
            (d_in, d_out), rank = pair.widths, self.rank or pair.rank
            return Pair(fresh_factor(seed, name, rank, d_in), torch.zeros(d_out, rank), pair.scale)

        return State(adapter=template.map(begun), seed=seed)

    def cut(self, pair: Pair, rank: int) -> Pair:
        """The strongest directions."""
        return best([pair], [1.0], rank, pair.scale)

    def from_all(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
    ) -> State:
        """Module by module, so that memory is that of one module's factors."""
        parts = shares(weights)

        def aggregate(name: str, old: Pair) -> Pair:
            own = [update.pairs[name] for update in updates]
            if len(own) == 1 and own[0].rank == old.rank:
                return own[0].at_scale(old.scale)
            return self._grown(state, name, best(own, parts, self.rank or old.rank, old.scale), round + 1)

        return replace(state, adapter=state.adapter.map(aggregate, mean_extras(updates, weights)))

    def _grown(self, state: State, name: str, pair: Pair, draw: int) -> Pair:
        """With fresh rows of A, and zeros in B, where few parties of low rank did not fill the rank."""
        more = (self.rank or state.adapter.pairs[name].rank) - pair.rank
        if more <= 0:
            return pair
        rows = fresh_factor(state.seed, name, more, pair.widths[0], draw=draw)
        return Pair(torch.cat([pair.a, rows]), torch.nn.functional.pad(pair.b, (0, more)), pair.scale)


@dataclass(frozen=True, kw_only=True)
class FRA(FlexLoRA):
    """The same arithmetic as flexlora, under the name of the paper that compared it under differential privacy."""

    name = "fra"
    source = "Full Rank Aggregation (Trautmann et al., 2501.06332; abstract only, the algebra is standard)"
    says = "as flexlora"


@dataclass(frozen=True, kw_only=True)
class FRAThenFFA(FlexLoRA):
    """`fra` for the first rounds, then `ffa`: A stays as the last of those rounds left it."""

    name = "fra-then-ffa"
    source = "the schedule that Trautmann et al. suggest against overfitting; the round at which to change is ours"
    says = "fra in the first rounds, then the mean of B with A as fra left it"
    one_rank = "in its second part the mean of B needs one A for all"

    switch: int = 5
    """The first round of the second part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.switch < 1:
            raise UsageError(f"switch={self.switch} leaves no round to fra.", expected="1 or more", hint="--rule ffa")

    def by_mean(self, round: int) -> bool:
        """In the second part."""
        return round >= self.switch

    def steps(self, round: int) -> tuple[Step, ...]:
        """Both factors, then B alone."""
        return (Step(trains="B", sends="B"),) if self.by_mean(round) else (Step(),)


@dataclass(frozen=True, kw_only=True)
class LoRAFair(Rule):
    """A = sum w A_k, B = sum w B_k + D, D so that (B + D) A comes closer to the mean of the products.

    The paper minimises S(mean of products, (B + D) A) + lambda |D| by gradient steps, S being a dissimilarity (cosine).
    Ours is the square of the Frobenius norm, which has a closed form, D = E A^T (A A^T + lambda I)^-1 with E what the
    means miss, and is never worse than D = 0. E A^T = sum w (B_k - B) A_k A^T needs no product of the module's size.
    `ridge` is lambda in units of the mean square of a row of A, so that it means the same for every module.
    """

    name = "lora-fair"
    source = "LoRA-FAIR (Bian et al., 2411.14961); the measure of closeness is ours"
    says = "mean of A, and the B that brings the product closest to the mean of the products"
    needs_all = IN_THE_CLEAR
    one_rank = "factors are averaged value by value"
    no_dp = "what it corrects by is made of products of noise"

    ridge: float = 0.01

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise UsageError(f"ridge={self.ridge} is not allowed.", expected="0 or more")

    def from_all(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
    ) -> State:
        """B with its correction."""

        def aggregate(name: str, old: Pair) -> Pair:
            own = [update.pairs[name].at_scale(old.scale) for update in updates]
            a, b = (mean_tensor(list(f), weights) for f in zip(*((p.a, p.b) for p in own), strict=True))
            missed = torch.zeros(b.shape, dtype=torch.float64)
            for pair, part in zip(own, shares(weights), strict=True):
                missed += part * (pair.b.double() - b.double()) @ (pair.a.double() @ a.double().T)
            return Pair(a, (b.double() + self._solved(a.double(), missed)).float(), old.scale)

        return replace(state, adapter=state.adapter.map(aggregate, mean_extras(updates, weights)))

    def _solved(self, a: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
        """`missed` (A A^T + lambda I)^-1, with least squares where that has no inverse."""
        gram = a @ a.T
        gram += self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return missed @ torch.linalg.pinv(gram, hermitian=True)
