"""The discrete Gaussian with a large sigma, from draws with small ones.

A grid of 2^32 steps is so fine that noise is millions of steps wide, and the exact sampler of
`splitfl.privacy.discrete` keeps a table as long as its noise is wide. But if Y and Z are discrete Gaussians with sigmas
a and b, then X = m Y + Z is one with sigma^2 = m^2 a^2 + b^2, all but exactly:

    P[X = x] is proportional to exp(-x^2 / (2 sigma^2)) * sum over y of exp(-(y - c x)^2 / (2 tau^2))

with tau = a b / sigma, and by Poisson summation the sum over y differs from its mean over all real shifts by a factor
of at most 1 +- 2.01 exp(-2 pi^2 tau^2). Here tau is above 7.9, which puts the factor within 1e-500 of 1. The same
calculation says that the sum of several parties' noise is again a discrete Gaussian, and as closely (m = 1).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from splitfl.errors import UsageError
from splitfl.privacy.discrete import LARGEST_SIGMA, sampler

_MULTIPLE, _FINE = 256, 3072.0
LARGEST = 2.0**36


def draw(sigma: float, count: int) -> npt.NDArray[np.int64]:
    """`count` independent values with this sigma, int64.

    Raises:
        UsageError: sigma out of range.
    """
    if not sigma <= LARGEST:
        raise UsageError(f"Noise of {sigma:g} steps cannot be drawn.", expected=f"at most {LARGEST:g}")
    if sigma <= LARGEST_SIGMA:
        return sampler(sigma).draw(count).astype(np.int64)
    coarse, fine = parts(sigma)
    values = draw(coarse, count)
    values *= _MULTIPLE
    values += sampler(fine).draw(count)
    return values


def parts(sigma: float) -> tuple[float, float]:
    """The sigmas of the coarse and the fine part, for a sigma above that of the table sampler."""
    coarse = math.sqrt(sigma * sigma - _FINE * _FINE) / _MULTIPLE
    return coarse, _FINE
