"""Averaging: closed forms, caps, robust means, the error of averaging factors, and the guard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from party.fedmod_mix import Mixed, Update, aggregation_error, guarded_mix, mix
from party.fedmod_model import Layout, Pair

A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"
LAYOUT = Layout(
    places={A: slice(0, 6), B: slice(6, 14)}, shapes={A: (2, 3), B: (4, 2)}, pairs=(Pair(a=A, b=B, scaling=2.0),)
)
START = torch.cat([torch.linspace(-1, 1, 6), torch.zeros(8)])


def vector(seed: int, scale: float = 1.0) -> torch.Tensor:
    return START + scale * torch.randn(14, generator=torch.Generator().manual_seed(seed))


def update(name: str, values: torch.Tensor, **facts: float) -> Update:
    return Update(name=name, vector=values, **{"rows": 10, **facts})  # type: ignore[arg-type]


def test_without_neighbours_nothing_changes():
    own = vector(1)
    mixed = mix(own, START, [], LAYOUT, rows=10)
    assert torch.equal(mixed.vector, own)
    assert mixed.weights == {"": 1.0}


def test_weights_are_capped_rows_times_similarity():
    own, near, far = vector(1), vector(2), vector(3)
    updates = [update("near", near, rows=1_000_000, similarity=0.5), update("far", far, rows=5, similarity=-0.3)]
    mixed = mix(own, START, updates, LAYOUT, rows=10, row_cap=3.0)
    # one's own: 10; near: min(10^6, 30) x 0.5 = 15; far: nothing, for it is unlike
    assert mixed.weights == pytest.approx({"": 0.4, "near": 0.6, "far": 0.0})
    torch.testing.assert_close(mixed.vector, 0.4 * own + 0.6 * near)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=5), st.randoms())
def test_the_order_of_neighbours_does_not_matter(rows, random):
    updates = [update(str(n), vector(n + 10), rows=each) for n, each in enumerate(rows)]
    shuffled = random.sample(updates, len(updates))
    for robust in ("none", "trimmed", "median"):
        one, other = (mix(vector(1), START, u, LAYOUT, rows=20, robust=robust).vector for u in (updates, shuffled))
        torch.testing.assert_close(one, other)


def test_a_long_update_is_cut_to_the_cap():
    own, long = vector(1), START + 100 * (vector(2) - START)
    mixed = mix(own, START, [update("long", long)], LAYOUT, rows=10, norm_cap=2.0)
    share = 2.0 * float((own - START).norm()) / float((long - START).norm())
    assert mixed.capped == pytest.approx({"long": share})
    torch.testing.assert_close(mixed.vector, START + (own - START) / 2 + (long - START) * share / 2)
    assert not mix(own, START, [update("long", long)], LAYOUT, rows=10, norm_cap=0.0).capped


@pytest.mark.parametrize("robust", ["trimmed", "median"])
def test_one_liar_among_three_cannot_leave_the_range_of_the_honest(robust):
    own, honest = vector(1), vector(2)
    for liar in (START + 1e6, START - 1e6):
        mixed = mix(own, START, [update("honest", honest), update("liar", liar)], LAYOUT, rows=10, robust=robust)
        low, high = torch.minimum(own, honest), torch.maximum(own, honest)
        assert bool(((mixed.vector >= low - 1e-4) & (mixed.vector <= high + 1e-4)).all())
        assert mixed.error is None
    plain = mix(own, START, [update("honest", honest), update("liar", START + 1e6)], LAYOUT, rows=10)
    assert float(plain.vector.max()) > 1e5, "the plain mean follows the liar"


def test_the_median_of_four_and_the_trimmed_mean_of_five():
    rows = [vector(n) for n in range(5)]
    median = mix(rows[0], START, [update(str(n), rows[n]) for n in (1, 2, 3)], LAYOUT, rows=10, robust="median")
    ordered = torch.stack(rows[:4]).sort(dim=0).values
    torch.testing.assert_close(median.vector, (ordered[1] + ordered[2]) / 2)
    trimmed = mix(rows[0], START, [update(str(n), rows[n]) for n in (1, 2, 3, 4)], LAYOUT, rows=10, robust="trimmed")
    torch.testing.assert_close(trimmed.vector, torch.stack(rows).sort(dim=0).values[1:4].mean(dim=0))


def test_only_the_chosen_factor_is_averaged():
    own, other, chosen = vector(1), START + 50 * (vector(2) - START), LAYOUT.chosen("B")
    assert chosen.tolist() == [False] * 6 + [True] * 8
    mixed = mix(own, START, [update("other", other)], LAYOUT, rows=10, chosen=chosen, norm_cap=1.0)
    assert torch.equal(mixed.vector[:6], own[:6])
    assert not torch.equal(mixed.vector[6:], own[6:])
    # the cap is of what is averaged: its length is that of one's own B
    moved = 2 * (mixed.vector - START)[6:] - (own - START)[6:]
    assert float(moved.norm()) == pytest.approx(float((own - START)[6:].norm()), rel=1e-4)


def test_the_error_is_that_of_the_dense_products():
    vectors, weights = [vector(1), vector(2), vector(3)], [0.5, 0.3, 0.2]

    def product(v):
        return 2.0 * LAYOUT.factor(v, B) @ LAYOUT.factor(v, A)

    ideal = sum(w * product(v) for w, v in zip(weights, vectors, strict=True))
    mean = product(sum(w * v for w, v in zip(weights, vectors, strict=True)))
    expected = float((mean - ideal).norm() / ideal.norm())
    assert expected > 0.05
    assert aggregation_error(vectors, weights, LAYOUT) == pytest.approx(expected, rel=1e-5)


def test_sharing_one_factor_makes_the_average_exact():
    one, other = vector(1), vector(2)
    other[:6] = one[:6]
    assert aggregation_error([one, other], [0.5, 0.5], LAYOUT) < 1e-6


# ---- the guard


def blended(own):
    return lambda updates: mix(own, START, updates, LAYOUT, rows=10)


def test_the_guard_finds_whose_adapter_does_harm():
    own = vector(1)
    good, bad = update("good", own + 0.01), update("bad", own + 100.0)

    def loss(values):
        return 1.0 + float((values - own).abs().mean())

    verdict = guarded_mix(own, [good, bad], blended(own), loss, 0.1)
    assert verdict.left_out == ("bad",)
    assert set(verdict.mixed.weights) == {"", "good"}
    assert verdict.after <= 1.1
    open_door = guarded_mix(own, [good, bad], blended(own), loss, 0.0)
    assert open_door.left_out == ()
    assert open_door.after > 10


def test_the_guard_keeps_ones_own_where_all_do_harm_and_takes_no_loss_that_is_not_a_number():
    own = vector(1)
    updates = [update("a", vector(2)), update("b", vector(3))]
    verdict = guarded_mix(own, updates, blended(own), lambda v: 1.0 if torch.equal(v, own) else math.nan, 0.1)
    assert torch.equal(verdict.mixed.vector, own)
    assert verdict.left_out == ("a", "b")
    assert verdict.before == verdict.after == 1.0


def test_the_guard_lets_nobody_through_whose_sum_does_harm():
    own = vector(1)
    left, right = update("a", own + 1), update("b", own + 1)
    calls: list[int] = []

    def blend(updates) -> Mixed:
        calls.append(len(updates))
        return Mixed(vector=own + len(updates), weights={})

    losses = {0: 1.0, 1: 1.05, 2: 2.0}
    verdict = guarded_mix(own, [left, right], blend, lambda v: losses[round(float((v - own).mean()))], 0.1)
    assert torch.equal(verdict.mixed.vector, own)
    assert calls == [2, 1, 1, 2, 0]
