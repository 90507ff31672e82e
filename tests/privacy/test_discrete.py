"""The discrete Gaussian: the table against its closed form, the draws against the table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from splitfl.errors import UsageError
from splitfl.privacy.discrete import LARGEST_SIGMA, Sampler

DRAWS = 200_000


def exact(sigma: float, value: int) -> float:
    reach = math.ceil(40 * sigma) + 40
    weights = [math.exp(-(k * k) / (2 * sigma * sigma)) for k in range(-reach, reach + 1)]
    return math.exp(-(value * value) / (2 * sigma * sigma)) / math.fsum(weights)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 17.5, 300.0])
def test_the_table_is_the_closed_form(sigma):
    sampler = Sampler(sigma)
    for value in {0, 1, -1, 2, round(sigma), -round(3 * sigma)}:
        assert sampler.probability(value) == pytest.approx(exact(sigma, value), rel=1e-9, abs=1e-15)
    assert 0 < sampler.distance < 1e-12


@pytest.mark.parametrize("sigma", [0.3, 1.0, 17.5, 300.0])
def test_draws_have_the_moments_of_the_table(sigma):
    sampler = Sampler(sigma)
    drawn = sampler.draw(DRAWS).astype(np.float64)
    values = np.arange(-math.ceil(10 * sigma), math.ceil(10 * sigma) + 1, dtype=np.float64)
    weights = np.exp(-(values**2) / (2 * sigma**2))
    variance, fourth = (float((values**power * weights).sum() / weights.sum()) for power in (2, 4))
    # Six standard errors: one false alarm in five hundred million runs.
    assert abs(drawn.mean()) < 6 * math.sqrt(variance / DRAWS)
    assert abs((drawn**2).mean() - variance) < 6 * math.sqrt((fourth - variance**2) / DRAWS)
    neighbours = (drawn[1:] * drawn[:-1]).mean()
    assert abs(neighbours) < 6 * variance / math.sqrt(DRAWS)


def test_no_two_draws_are_the_same_and_no_seed_matters():
    sampler = Sampler(50.0)
    np.random.seed(0)
    first = sampler.draw(100)
    np.random.seed(0)
    assert not np.array_equal(first, sampler.draw(100))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, LARGEST_SIGMA * 2])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(UsageError, match="grid"):
        Sampler(sigma)
