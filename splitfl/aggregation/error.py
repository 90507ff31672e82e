"""How far a round's aggregate is from the weighted mean of what the parties learnt; from factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.low_rank import norm
from splitfl.aggregation.rule import Rule, shares
from splitfl.aggregation.state import State

_NOTHING = 1e-8  # what rounding may leave where a change is zero


def aggregation_error(
    rule: Rule, before: State, after: State, updates: Sequence[Update], weights: Sequence[float]
) -> float | None:
    """|change after the round - weighted mean of the parties' changes| / |that mean|, Frobenius over all modules.

    Args:
        before: the state that the parties trained from.
        after: what the round made of it.
        updates: what they trained, at their own ranks.
        weights: positive; only their ratios count.

    Returns:
        None where the rule leaves a part of the model at each party: there is no change of all. Infinite where the mean
        is nothing and the change is not. What is tuned whole is not in it: its mean is exact.
    """
    if rule.no_global:
        return None
    parts = shares(weights)
    off, whole = 0.0, 0.0
    for name in after.adapter.pairs:
        mean = [update.pairs[name] for update in updates]
        whole += norm(mean, parts) ** 2
        now, then = changes(after, name), [before.merged[name]] if name in before.merged else []
        signs = [1.0] * len(now) + [-1.0] * len(then) + [-part for part in parts]
        off += norm([*now, *then, *mean], signs) ** 2
    if off == 0.0:
        return 0.0
    return math.sqrt(off / whole) if whole else math.inf


def agrees(own: State, other: State, *, tolerance: float = 1e-4) -> bool:
    """Whether two states change the model alike, up to `tolerance` of the change, with the same head.

    For rules whose last bits depend on a machine's libraries (`Rule.same_bits` is false): a party takes another's state
    only if its own says the same. Factors may differ where products do not.
    """
    if (
        own.adapter.pairs.keys() != other.adapter.pairs.keys()
        or own.adapter.extras.keys() != other.adapter.extras.keys()
    ):
        return False
    for name, pair in own.adapter.pairs.items():
        if pair.widths != other.adapter.pairs[name].widths:
            return False
        mine, theirs = changes(own, name), changes(other, name)
        apart = norm([*mine, *theirs], [1.0] * len(mine) + [-1.0] * len(theirs))
        if apart > tolerance * norm(mine) + _NOTHING:
            return False
    return all(
        tensor.shape == other.adapter.extras[name].shape
        and bool(((tensor - other.adapter.extras[name]).abs() <= tolerance * tensor.abs() + _NOTHING).all())
        for name, tensor in own.adapter.extras.items()
    )


def changes(state: State, name: str) -> list[Pair]:
    """The pairs whose sum is all that `state` changes of a module."""
    merged = state.merged.get(name)
    return [state.adapter.pairs[name]] + ([merged] if merged is not None else [])
