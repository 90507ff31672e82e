"""Values as whole numbers: nothing wraps, nothing is biased, weights keep their digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.aggregation.grid import CHECKS, EXTRA, Grid
from splitfl.errors import DataError, UsageError, WireError

BFV = 1073692673


def grid_of(parties=4, clip=0.5, max_weight=1.0, **more) -> Grid:
    return Grid(parties=parties, clip=clip, max_weight=max_weight, **more)


def opened(grid, vectors, weights):
    """The mean by way of the grid: whole numbers are added as the ring adds them."""
    total = np.zeros(len(vectors[0]) + EXTRA, dtype=np.int64)
    for vector, weight in zip(vectors, weights, strict=True):
        total += grid.encode(vector, weight)
    assert np.abs(total[:-EXTRA]).max() <= grid.half
    return grid.decode(total.astype(np.int32), len(vectors))


def test_the_mean_comes_back_to_within_a_step_a_party():
    rng = np.random.default_rng(0)
    vectors = [rng.normal(0, 0.01, 1000).astype(np.float32) for _ in range(4)]
    grid = grid_of()
    mean, weight = opened(grid, vectors, [1.0] * 4)
    assert mean.dtype == np.float32
    assert weight == 4.0
    assert np.abs(mean - np.mean(vectors, axis=0, dtype=np.float64)).max() <= grid.step + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    parties=st.integers(1, 60),
    modulus=st.sampled_from([1 << 32, BFV]),
    clip=st.floats(1e-6, 1e6),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_a_full_sum_cannot_wrap(parties, modulus, clip, sign):
    """Every value at the clip or far beyond it, every party at the largest weight."""
    grid = grid_of(parties, clip, 7.0, modulus=modulus)
    vector = np.array([sign * clip, sign * clip * 1e3, -sign * clip, np.float32(sign * clip)], dtype=np.float32)
    total = sum(grid.encode(vector, 7.0).astype(np.int64) for _ in range(parties))
    assert np.abs(total[:-EXTRA]).max() <= grid.half < modulus / 2
    assert np.abs(total[-EXTRA:]).max() <= grid.half
    mean, weight = grid.decode(total.astype(np.int32), parties)
    np.testing.assert_allclose(mean, np.clip(vector, -clip, clip), rtol=2e-4)
    assert weight == pytest.approx(7.0 * parties, rel=1e-12)


def test_the_ring_is_used_to_the_full():
    grid = grid_of(10)
    assert grid.half - 10 < grid.levels * 10 <= grid.half
    assert grid.step == pytest.approx(2 * 0.5 / (2**32 / 10), rel=1e-6)


def test_few_rows_under_a_large_cap_lose_no_digits():
    """One quantiser for the weight and the values would leave ten rows under a cap of 1000 three digits."""
    rng = np.random.default_rng(1)
    vectors = [rng.uniform(-1, 1, 5000).astype(np.float32) for _ in range(10)]
    mean, weight = opened(grid_of(10, 1.0, 1000.0), vectors, [10.0] * 10)
    assert np.abs(mean - np.mean(vectors, axis=0, dtype=np.float64)).max() < 1e-6
    assert weight == pytest.approx(100.0, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1000), min_size=1, max_size=12))
def test_a_mean_is_weighted(weights):
    rng = np.random.default_rng(2)
    vectors = [rng.uniform(-0.5, 0.5, 50).astype(np.float32) for _ in weights]
    grid = grid_of(len(weights), 0.5, 1000.0)
    mean, weight = opened(grid, vectors, weights)
    expected = sum(w * v.astype(np.float64) for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    assert np.abs(mean - expected).max() <= len(weights) * grid.step * 1000 / sum(weights) + 1e-7
    assert weight == pytest.approx(sum(weights), rel=1e-9)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.9])
def test_rounding_is_unbiased(fraction):
    """Between two steps the mean of many draws is the value; its deviation is that of a coin."""
    grid = grid_of(1, 1.0)
    count = 200_000
    value = np.float32((1000 + fraction) * grid.step)  # float32 is exact to 2^-14 of a step here
    exact = float(value) / grid.step
    drawn = grid.encode(np.full(count, value), 1.0)[:-EXTRA]
    assert set(np.unique(drawn)) <= {math.floor(exact), math.floor(exact) + 1}
    share = exact - math.floor(exact)
    deviation = math.sqrt(max(share * (1 - share), 1e-9) / count)
    assert abs(drawn.mean() - exact) < 6 * deviation + 2.0**-16


def test_negative_values_are_rounded_like_positive_ones():
    grid = grid_of(1, 1.0)
    drawn = grid.encode(np.full(100_000, np.float32(-3.5 * grid.step)), 1.0)[:-EXTRA]
    assert set(np.unique(drawn)) == {-4, -3}
    assert abs(drawn.mean() + 3.5) < 0.02


def test_whole_steps_are_not_moved():
    grid = grid_of(1, float(2**31 - 1))
    assert grid.step == 1.0
    values = np.array([0, 1, -1, 2**23, -(2**23)], dtype=np.float32)
    assert grid.encode(values, 1.0)[:-EXTRA].tolist() == values.astype(int).tolist()


def test_two_encodings_differ_only_by_their_coins():
    vector = np.random.default_rng(3).normal(0, 0.1, 10_000).astype(np.float32)
    grid = grid_of()
    one, two = (grid.encode(vector, 1.0).astype(np.int64) for _ in range(2))
    assert np.abs(one - two).max() == 1


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_values_that_are_not_finite_are_refused_without_showing_them(wrong, place):
    vector = np.full(100_000, 0.125, dtype=np.float32)
    vector[place] = wrong
    with pytest.raises(DataError, match="not finite") as caught:
        grid_of().encode(vector, 1.0)
    assert "0.125" not in str(caught.value)
    assert str(place) not in str(caught.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, math.nan, math.inf])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(DataError, match="weight"):
        grid_of().encode(np.zeros(3, dtype=np.float32), weight)


def test_the_vector_itself_is_left_as_it_was():
    vector = np.array([9.0, -9.0, 0.1], dtype=np.float32)
    before = vector.copy()
    grid_of().encode(vector, 0.5)
    np.testing.assert_array_equal(vector, before)


def test_what_is_not_a_sum_is_refused():
    grid, vectors = grid_of(), [np.full(20, 0.1, dtype=np.float32)] * 4
    total = sum(grid.encode(vector, 1.0) for vector in vectors)
    grid.decode(total, 4)
    with pytest.raises(WireError, match="not the sum of 3"):
        grid.decode(total, 3)
    rng = np.random.default_rng(4)
    for _ in range(50):
        masked = (total.view(np.uint32) + rng.integers(0, 2**32, len(total), dtype=np.uint32)).view(np.int32)
        with pytest.raises(WireError, match="not the sum"):
            grid.decode(masked, 4)
    for place in range(1, CHECKS + 1):
        changed = total.copy()
        changed[-place] += 1
        with pytest.raises(WireError):
            grid.decode(changed, 4)


def test_a_mean_beyond_the_clip_is_refused():
    grid = grid_of(10)
    total = sum(grid.encode(np.zeros(20, dtype=np.float32), 0.1) for _ in range(10))
    total[3] = round(grid.levels * 1.01)
    with pytest.raises(WireError, match="beyond the clip"):
        grid.decode(total, 10)
    total[3] = -round(grid.levels * 1.01)
    with pytest.raises(WireError, match="beyond the clip"):
        grid.check(total, 10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=EXTRA + 1, max_size=20), st.integers(1, 4))
def test_any_numbers_are_a_mean_within_the_clip_or_an_error(numbers, parties):
    try:
        mean, weight = grid_of().decode(np.array(numbers, dtype=np.int64).astype(np.int32), parties)
    except WireError:
        return
    assert np.abs(mean).max() <= 0.5
    assert 0 < weight <= parties


@pytest.mark.parametrize(
    "figures",
    [{"clip": 0.0}, {"clip": math.inf}, {"clip": math.nan}, {"max_weight": -1.0}, {"parties": 0}, {"parties": 10**7},
     {"modulus": 2**33}, {"modulus": 3}, {"reserve": -1}, {"reserve": 2**31}],
)  # fmt: skip
def test_grids_that_make_no_sense_are_refused(figures):
    with pytest.raises(UsageError):
        grid_of(**figures)
