"""The sketch: its sensitivity exactly, its noise, its promise, and what it is good for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import UsageError
from splitfl.privacy.calibration import zcdp_epsilon
from splitfl.sketch import DIRECTIONS, GRID, Sketch, plan_sketch, release, row_codes, similarities

CENTRE = np.zeros(24)


def features(seed: int, rows: int, topic: int = 0, strength: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(seed)
    offset = np.random.default_rng(1000 + topic).standard_normal(24)
    return strength * offset + drawn.standard_normal((rows, 24))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-30, 1e30), st.sampled_from([1, 3, 128, 1000]))
def test_a_row_adds_no_more_than_the_grid(seed, scale, grid):
    codes = row_codes(scale * features(seed, 20), CENTRE, 0, grid)
    assert codes.shape == (20, DIRECTIONS)
    assert int((codes**2).sum(axis=1).max()) <= grid * grid


def test_rows_at_the_border_and_rows_that_are_no_numbers():
    strange = np.zeros((6, 24))
    strange[1, 0], strange[2, 0], strange[3, 0], strange[4, 3], strange[5] = math.nan, math.inf, -math.inf, 1e308, 1e308
    codes = row_codes(strange, CENTRE, 0, GRID)
    assert not codes[:4].any(), "what is not finite adds nothing"
    assert int((codes**2).sum(axis=1).max()) <= GRID * GRID


@pytest.mark.parametrize("with_labels", [False, True])
def test_taking_a_row_away_and_replacing_one_stay_within_the_stated_sensitivity(with_labels):
    rows = features(1, 60)
    labels = [number % 3 for number in range(60)]
    plan = plan_sketch(1.0, 1e-6)

    def total(which, names=labels):
        kept = [names[i] for i in which] if with_labels else None
        return row_codes(rows[list(which)], CENTRE, 0, plan.grid, labels=kept, classes=3).sum(axis=0)

    whole = total(range(60))
    assert whole.shape == ((3 if with_labels else 1) * DIRECTIONS,)
    for gone in range(60):
        without = total([i for i in range(60) if i != gone])
        assert np.linalg.norm(whole - without) <= plan.grid
        other = np.linalg.norm(whole - total([*range(gone), (gone + 7) % 60, *range(gone + 1, 60)]))
        assert other <= plan.sensitivity
    rows[1] = -rows[0]  # the worst that can be: a row and its opposite
    worst = np.linalg.norm(total([0]) - total([1], [labels[0]] * 60))
    assert 0.95 * plan.sensitivity < worst <= plan.sensitivity


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 8.0, 60.0])
def test_the_noise_keeps_the_promise(epsilon):
    plan = plan_sketch(epsilon, 1e-6)
    assert plan.rho == pytest.approx((2 * plan.grid / plan.sigma) ** 2 / 2)
    assert epsilon * 0.98 < zcdp_epsilon(plan.rho, 1e-6) <= epsilon
    claim = plan.claim()
    assert claim.formal
    for words in ("replace one", "one record", "1 planned", "delta 1e-06", "peers"):
        assert words in claim.sentence()


def test_an_epsilon_beyond_the_sampler_is_refused():
    with pytest.raises(UsageError, match="more noise than can be drawn"):
        plan_sketch(1e-4, 1e-6)


def test_a_release_is_the_sum_and_noise_of_that_width():
    plan = plan_sketch(2.0, 1e-6)
    codes = row_codes(features(3, 200), CENTRE, 0, plan.grid)
    noise = np.concatenate([release(codes, plan).values - codes.sum(axis=0) for _ in range(60)])
    assert abs(noise.std() / plan.sigma - 1) < 0.1  # 1,920 values: standard error 1.6 %
    assert abs(noise.mean()) < 5 * plan.sigma / math.sqrt(len(noise))
    with pytest.raises(UsageError, match="0 rows"):
        release(codes[:0], plan)


def test_everybody_draws_the_same_directions():
    one, other = (row_codes(features(1, 5), CENTRE, seed, GRID) for seed in (4, 4))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, row_codes(features(1, 5), CENTRE, 5, GRID))


def test_similar_servers_rank_first_and_noise_draws_towards_nothing():
    plan = plan_sketch(1.0, 1e-6)
    right = 0
    for attempt in range(20):
        made = {
            (topic, server): release(row_codes(features(7 * server + attempt, 300, topic), CENTRE, 0, plan.grid), plan)
            for topic in range(3)
            for server in range(2)
        }
        for me, sketch in made.items():
            found = similarities(sketch, {str(n): s for n, s in made.items() if n != me})
            right += max(found, key=found.__getitem__) == str((me[0], 1 - me[1]))
    assert right >= 116  # of 120


def test_similarities_of_none_of_one_and_of_nothing():
    zero = Sketch(values=np.zeros(4, dtype=np.int32), rows=1, grid=1)
    assert similarities(zero, {}) == {}
    assert similarities(zero, {"a": zero}) == {"a": 0.0}
    same = Sketch(values=np.array([3, 0, 0, 4], dtype=np.int32), rows=5, grid=1)
    assert similarities(same, {"a": same}) == {"a": pytest.approx(1.0)}
    # the mean vector counts, not the number of rows
    more = Sketch(values=same.values * 7, rows=35, grid=1)
    other = Sketch(values=np.array([4, 0, 0, -3], dtype=np.int32), rows=5, grid=1)
    found = similarities(same, {"more": more, "other": other})
    assert found["more"] > 0.99
    assert found["other"] < -0.9
