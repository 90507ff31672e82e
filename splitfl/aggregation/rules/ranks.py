"""Rules for parties of different ranks that keep to means of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.low_rank import best, norm
from splitfl.aggregation.peft_format import filled
from splitfl.aggregation.rule import IN_THE_CLEAR, Rule, mean_extras, mean_tensor, shares
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import Vector
from splitfl.errors import UsageError, WireError

_MARK = np.float32(2**-6)  # small, so that no clip of values cuts it; a power of two, so that it is exact
_TOO_LITTLE = 2**-14  # share of all weights: above what encrypted sums leave as noise


@dataclass(frozen=True, kw_only=True)
class RBLA(Rule):
    """Row i of A is the weighted mean over the parties whose rank reaches it; columns of B alike.

    Dividing by all weights instead, as zero-padding does, would shrink what only some parties hold. The weights under
    each row need not be told: every party appends one mark for each row it has, and the mean of the marks, in ratio to
    the first row's, is the share of weight behind the row. So the sum is all that anybody sees, whoever drops out.
    Rows that nobody of this round reaches stay as they are. With `canonical` the result is written with its strongest
    directions first, which is what parties of lower rank get.
    """

    name = "rbla"
    source = "RBLA (Chen et al., 2408.08699)"
    says = "each rank's rows are averaged over the parties that have them"
    linear = True
    same_bits = True
    no_dp = "the marks that tell which rows a party has would drown in the noise"

    canonical: bool = False

    def length(self, state: State, round: int, step: int = 0) -> int:
        """The factors and one mark for each row of the federation's rank."""
        return super().length(state, round, step) + _highest(state)

    def vector(self, state: State, trained: Update, round: int, step: int = 0) -> Vector:
        """Factors filled up with zeros, then the marks."""
        marks = np.zeros(_highest(state), dtype=np.float32)
        marks[: max(trained.ranks, default=0)] = _MARK
        return np.concatenate([super().vector(state, trained, round, step), marks])

    def from_mean(self, state: State, mean: Vector, round: int, step: int = 0) -> State:
        """Each row divided by its share."""
        values = super().length(state, round, step)
        if (
            mean.shape != (values + _highest(state),)
            or not np.isfinite(mean).all()
            or mean[values:][:1].min(initial=1) <= 0
        ):
            raise WireError(
                f"A mean of shape {mean.shape} is none of this federation, or its marks are not.",
                expected=f"({values + _highest(state)},)",
            )
        behind = torch.from_numpy((mean[values:] / mean[values : values + 1]).astype(np.float64))
        padded = super().from_mean(state, mean[:values], round, step)

        def divided(name: str, pair: Pair) -> Pair:
            part, old = behind[: pair.rank], state.adapter.pairs[name]
            held = part > _TOO_LITTLE
            part = torch.where(held, part, torch.ones_like(part))
            a = torch.where(held[:, None], (pair.a.double() / part[:, None]).float(), old.a)
            b = torch.where(held, (pair.b.double() / part).float(), old.b)
            whole = Pair(a, b, pair.scale)
            if not self.canonical:
                return whole
            return filled(best([whole], [1.0], pair.rank, pair.scale), pair.rank)

        return replace(padded, adapter=padded.adapter.map(divided))


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Rule):
    """Zero-padded means with weights norm(B_k A_k) / sum of norms; parties give up ranks they do not use.

    A party's norm is that of all its modules together; numbers of rows play no part but for what is tuned whole. The
    paper's text was not at hand: formula and pruning follow reviews of it and two reimplementations, and agree between
    these. Ours is that rows no party holds keep their A (B zero), since zeros in both could never be trained again.
    """

    name = "hetlora"
    source = "HetLoRA (Cho et al., 2401.06432), as restated by others"
    says = "zero-padded means, weighted by the norm of each party's change; parties give up ranks they do not use"
    needs_all = IN_THE_CLEAR
    no_dp = "the weights are norms of the updates, so that the noisiest would count most"

    gamma: float = 0.9
    """Part of the rank that is kept when a party gives up ranks."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise UsageError(f"gamma={self.gamma} is not allowed.", expected="between 0 and 1")

    def tail(self, pair: Pair) -> torch.Tensor:
        """|B[:, kept:]| * |A[kept:]|: add it to the loss, times a factor, and ranks that are not needed vanish."""
        kept = self._kept(pair.rank)
        return torch.linalg.vector_norm(pair.b[:, kept:]) * torch.linalg.vector_norm(pair.a[kept:])

    def pruned(self, trained: Update, start: Update) -> Update:
        """`trained` without the last ranks, if their part of the change became smaller in training.

        One decision for all modules, over the sum of their tails: a party has one rank.
        """
        rank = max(trained.ranks, default=1)
        before, after = (sum(float(self.tail(pair)) for pair in update.pairs.values()) for update in (start, trained))
        kept = self._kept(rank)
        if kept == rank or not after < before:
            return trained
        return trained.map(lambda _, pair: self.cut(pair, kept))

    def _kept(self, rank: int) -> int:
        return max(1, int(self.gamma * rank))

    def from_all(
        self, state: State, updates: Sequence[Update], weights: Sequence[float], round: int, step: int = 0
    ) -> State:
        """With the norms as weights; all alike in a round where nothing was learnt."""
        squares = [sum(norm([pair]) ** 2 for pair in update.pairs.values()) for update in updates]
        norms = shares([square**0.5 for square in squares if square > 0] or weights)
        counted = [update for update, square in zip(updates, squares, strict=True) if square > 0] or list(updates)
        full = [self._at_full_rank(state, update) for update in counted]

        def aggregate(name: str, old: Pair) -> Pair:
            own = [update.pairs[name].at_scale(old.scale) for update in full]
            a, b = mean_tensor([p.a for p in own], norms), mean_tensor([p.b for p in own], norms)
            return Pair(torch.where(a.any(dim=1, keepdim=True), a, old.a), b, old.scale)

        return replace(state, adapter=state.adapter.map(aggregate, mean_extras(updates, weights)))


def _highest(state: State) -> int:
    return max(state.adapter.ranks, default=0)
