"""Parties with random adapters, and the dense float64 arithmetic that rules are compared with."""

from __future__ import annotations

import torch

from splitfl.aggregation.error import changes
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.rule import combine
from splitfl.aggregation.rules import RULES

WIDTHS = {"layers.0.q_proj": (12, 10), "layers.0.v_proj": (12, 6), "layers.1.mlp": (8, 20)}
HEAD = {"score.weight": (3, 12)}
BY_MEAN = ["rolora", "fedit", "ffa", "fedsa", "fedsvd", "rbla"]
CORES = ["fed-sb", "fedlrt"]
FROM_ALL = ["hetlora", "flora", "flexlora", "fra", "fra-then-ffa", "fedex", "lora-fair"]
assert {*BY_MEAN, *CORES, *FROM_ALL} == set(RULES)


def adapter(seed, *, rank=4, scale=2.0, widths=WIDTHS, size=1.0):
    """A party's adapter in which every value was trained."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return size * torch.randn(*shape, generator=generator)

    pairs = {n: Pair(drawn(rank, d_in), drawn(d_out, rank), scale) for n, (d_in, d_out) in widths.items()}
    return Update(pairs, {name: drawn(*shape) for name, shape in HEAD.items()})


def like(seed, update, *, size=1.0):
    """Random values in the shapes of `update`, whose modules may have ranks of their own."""
    drawn = {
        n: adapter(seed, rank=p.rank, scale=p.scale, widths={n: p.widths}, size=size) for n, p in update.pairs.items()
    }
    return Update({n: own.pairs[n] for n, own in drawn.items()}, adapter(seed, size=size).extras)


def trained(rule, state, round, seed, *, rank=None):
    """What a party has after training: what the rule trains is other than in the state, the rest is the state's."""
    start = rule.start(state, round, len(rule.steps(round)) - 1, rank=rank)
    part, drawn = rule.trains(round), like(seed, start)

    def changed(name, pair):
        new = drawn.pairs[name]
        if part == "core":
            core = torch.randn(pair.rank, pair.rank, generator=torch.Generator().manual_seed(seed))
            return Pair(pair.a, pair.b, pair.scale, core)
        return Pair(new.a if part in ("A", "both") else pair.a, new.b if part in ("B", "both") else pair.b, pair.scale)

    return start.map(changed, drawn.extras)


def dense(pair):
    b, a = pair.wide()
    return b @ a


def change(state, name):
    """All that a state changes of a module, float64 [d_out, d_in]."""
    return sum(dense(pair) for pair in changes(state, name))


def mean_change(updates, weights, name):
    total = sum(weights)
    return sum(w / total * dense(update.pairs[name]) for w, update in zip(weights, updates, strict=True))


def gap(found, expected):
    """Relative, Frobenius."""
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def same_bits(one, other):
    """Whether two updates are equal value by value."""
    for name, pair in one.pairs.items():
        theirs = other.pairs[name]
        if not (torch.equal(pair.a, theirs.a) and torch.equal(pair.b, theirs.b) and pair.scale == theirs.scale):
            return False
    return all(torch.equal(tensor, other.extras[name]) for name, tensor in one.extras.items())


def after_gradients(rule, state, round, seed=1000):
    """The state at the last step of the round, with two parties' random gradients in the steps before."""
    for step in range(len(rule.steps(round)) - 1):
        start = rule.start(state, round, step)
        grads = [like(seed + k, start) for k in range(2)]
        state = combine(rule, state, grads, [1.0, 2.0], round, step)
    return state
