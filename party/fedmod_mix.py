"""What a `fedmod` peer makes of its neighbours' adapters: cap, average, and a look at its own validation rows.

All in plain vectors, float32 [P], one a server. An *update* is the difference to the start that all share.

    cap         u_j <- u_j min(1, cap |u_own| / |u_j|)
    weight      min(rows_j, row_cap rows_own) max(similarity_j, 0), one's own similarity being 1
    none        start + sum_j w_j u_j / sum_j w_j
    trimmed     value by value, the largest and the smallest quarter (at least one each) left out, then that mean
    median      value by value, without weights

The mean of factors is not the mean of what they do: with A and B both averaged, scaling (sum w B)(sum w A) differs from
sum w B A by the weighted covariance of the factors. `aggregation_error` measures that; it is logged each round. With
`rolora` one factor is averaged in a round; that is exact between servers that share the other one, as all do in the
first round and neighbours only nearly do later.

Legend: P numbers of the adapter, n servers averaged over, one's own included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from party.fedmod_model import Layout

Robust = Literal["none", "trimmed", "median"]
_TRIMMED = 0.25


@dataclass(frozen=True, kw_only=True)
class Update:
    """One neighbour's adapter, checked for size and finite values."""

    name: str
    vector: torch.Tensor
    """[P]; what it did not send is one's own."""
    rows: int
    """As it claims."""
    similarity: float = 1.0
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What came out."""

    vector: torch.Tensor
    weights: dict[str, float]
    """Of the neighbours and of one's own (``""``); they add up to 1. Under median and trimmed, before anything is left
    out."""
    capped: dict[str, float] = field(default_factory=dict)
    """Neighbours whose update was longer than the cap allows, with the factor it was multiplied by."""
    error: float | None = None
    """Aggregation error; None where values were left out."""


def mix(
    own: torch.Tensor, start: torch.Tensor, updates: Sequence[Update], layout: Layout, *, rows: int,
    row_cap: float = 2.0, norm_cap: float = 0.0, robust: Robust = "none", chosen: torch.Tensor | None = None,
) -> Mixed:  # fmt: skip
    """Average one's own adapter with its neighbours'.

    Args:
        own: [P].
        start: [P], before any training.
        updates: the neighbours'; none gives one's own back.
        layout: of the vectors.
        rows: one's own.
        row_cap: most weight of a neighbour's rows, as a multiple of `rows`.
        norm_cap: longest update, as a multiple of one's own; 0 for any.
        robust: how values are averaged.
        chosen: bool [P], which values are averaged; the others stay one's own. None is all.
    """
    if not updates:
        return Mixed(vector=own.clone(), weights={"": 1.0})
    mine = own - start
    chosen = torch.ones_like(own, dtype=torch.bool) if chosen is None else chosen
    taken, capped = [mine], {}
    for update in updates:
        change = update.vector - start
        factor = _cap_factor(float(mine[chosen].norm()), float(change[chosen].norm()), norm_cap)
        if factor < 1:
            capped[update.name] = factor
        taken.append(torch.where(chosen, change * factor, mine))
    raw = [float(rows), *(min(u.rows, row_cap * rows) * max(u.similarity, 0.0) for u in updates)]
    weights = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    stack = torch.stack(taken)
    vector = torch.where(chosen, start + _average(stack, weights, robust), own)
    error = None
    if robust == "none":
        error = aggregation_error([start + row for row in stack], weights.tolist(), layout)
    named = dict(zip(["", *(u.name for u in updates)], weights.tolist(), strict=True))
    return Mixed(vector=vector, weights=named, capped=capped, error=error)


def _cap_factor(mine: float, theirs: float, cap: float) -> float:
    return 1.0 if cap == 0 or theirs <= cap * mine else cap * mine / theirs


def _average(stack: torch.Tensor, weights: torch.Tensor, robust: Robust) -> torch.Tensor:
    """Of `stack` [n, P]; trimming takes three servers, below that it is the plain mean."""
    if robust == "median":
        return torch.quantile(stack, 0.5, dim=0)
    weight = weights[:, None].to(stack.dtype).expand_as(stack)
    if robust == "trimmed" and len(stack) >= 3:
        out = max(1, int(_TRIMMED * len(stack)))
        order = stack.argsort(dim=0)
        kept = order[out : len(stack) - out]
        values, weight = stack.gather(0, kept), weight.gather(0, kept)
        total = weight.sum(0)
        # Kept values may all come from servers without weight; they then count alike.
        weight = torch.where(total > 0, weight, torch.ones_like(weight))
        return (values * weight).sum(0) / weight.sum(0)
    return (stack * weight).sum(0)


def aggregation_error(vectors: Sequence[torch.Tensor], weights: Sequence[float], layout: Layout) -> float:
    """|| mean B mean A - mean (B A) || / || mean (B A) ||, Frobenius over all modules; 0 where nothing was learnt.

    No product is formed: with both sides written as one product of stacked factors, ||B A||^2 is
    sum((B^T B) * (A A^T)).
    """
    difference = whole = 0.0
    for pair in layout.pairs:
        a = [layout.factor(v, pair.a).double() for v in vectors]
        b = [layout.factor(v, pair.b).double() for v in vectors]
        mean_a = sum((w * x for w, x in zip(weights, a, strict=True)), torch.zeros_like(a[0]))
        mean_b = sum((w * x for w, x in zip(weights, b, strict=True)), torch.zeros_like(b[0]))
        left = torch.cat([w * x for w, x in zip(weights, b, strict=True)], dim=1)
        right = torch.cat(a, dim=0)
        whole += pair.scaling**2 * _squared(left, right)
        both = torch.cat([left, -mean_b], dim=1), torch.cat([right, mean_a], dim=0)
        difference += pair.scaling**2 * _squared(*both)
    return math.sqrt(difference / whole) if whole > 0 else 0.0


def _squared(left: torch.Tensor, right: torch.Tensor) -> float:
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)


# ---- the guard


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard let through."""

    mixed: Mixed
    before: float
    """Loss on the validation rows with one's own adapter, in nats."""
    after: float
    """The same with what was let through."""
    left_out: tuple[str, ...] = ()
    """Neighbours whose adapter does harm by itself."""


def guarded_mix(
    own: torch.Tensor, updates: Sequence[Update], blend: Callable[[Sequence[Update]], Mixed],
    loss_of: Callable[[torch.Tensor], float], share: float,
) -> Verdict:  # fmt: skip
    """Mix, and look: where validation loss would rise by more than `share`, find out whose adapter it is.

    Each neighbour is then mixed in alone; those that do harm by themselves are left out, and if the rest does harm
    still, one's own adapter stays as it is. A loss that is not a number does harm.

    Args:
        own: one's own adapter, [P].
        updates: the neighbours'.
        blend: mixes one's own with some of them.
        loss_of: validation loss with an adapter, in nats.
        share: of the loss; 0 lets everything through.
    """
    before = loss_of(own)
    limit = before * (1 + share)

    def harms(loss: float) -> bool:
        return share > 0 and not loss <= limit

    mixed = blend(updates)
    after = loss_of(mixed.vector) if updates else before
    if not harms(after):
        return Verdict(mixed=mixed, before=before, after=after)
    good = [update for update in updates if not harms(loss_of(blend([update]).vector))]
    out = tuple(update.name for update in updates if update not in good)
    mixed = blend(good)
    after = loss_of(mixed.vector) if good else before
    if harms(after):
        return Verdict(mixed=blend([]), before=before, after=before, left_out=tuple(u.name for u in updates))
    return Verdict(mixed=mixed, before=before, after=after, left_out=out)
