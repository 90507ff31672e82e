"""The discrete Gaussian on the integers, from the operating system's random source, vectorised.

    P[X = k] proportional to exp(-k^2 / (2 sigma^2)),  k in Z

(Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", 2020, definition 1.) Sampling is by the
alias method (Walker 1977, Vose 1991) over a table of all k within `TAILS` standard deviations: one 64-bit word a value.
Its low bits choose a column; its high bits, which are others, decide between the column's two values. What the table
leaves out, and the rounding of its thresholds, is a total variation distance that `Sampler.distance` bounds; add it,
times the number of values, to delta.

Hides: nothing by itself. Does not hide: which generator was used; there is no seed, so nobody can draw the noise again.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt

from splitfl.errors import UsageError

TAILS = 9.5
"""Table half-width in standard deviations: what lies beyond has probability below 3e-21."""
LARGEST_SIGMA = 4096.0
_SMALLEST_SIGMA = 1e-3
_CHUNK = 1 << 16  # values drawn at a time: words, columns and both candidates then stay in the second-level cache


class Sampler:
    """Draws from the discrete Gaussian with one sigma.

    Args:
        sigma: in grid units, 0.001 to 4096.

    Raises:
        UsageError: `sigma` out of range.
    """

    def __init__(self, sigma: float) -> None:
        if not _SMALLEST_SIGMA <= sigma <= LARGEST_SIGMA:
            raise UsageError(
                f"A discrete Gaussian with sigma {sigma:g} grid units cannot be drawn.",
                expected=f"{_SMALLEST_SIGMA:g} to {LARGEST_SIGMA:g}",
                hint="choose a grid step between sigma / 4096 and sigma",
            )
        self.sigma = sigma
        reach = math.ceil(TAILS * sigma) + 1
        values = np.arange(-reach, reach + 1, dtype=np.int64)
        # Longest-double sums: the tails are 1e-20 of the middle and must not be lost to it.
        weights = np.exp(-(values.astype(np.longdouble) ** 2) / (2 * np.longdouble(sigma) ** 2))
        self._bits = max(1, math.ceil(math.log2(len(values))))
        self._precision = min(52, 64 - self._bits)
        table = _alias_table(values, weights / weights.sum(), self._bits, self._precision)
        self._first, self._other, self._threshold = table

    @property
    def distance(self) -> float:
        """Upper bound on the total variation distance of one value to the exact distribution."""
        outside = 2 * math.exp(-(TAILS**2) / 2)
        rounding = 2.0**-self._precision  # every column is off by at most half of that
        return outside + rounding

    def draw(self, count: int) -> npt.NDArray[np.int32]:
        """`count` independent values, int32."""
        out = np.empty(count, dtype=np.int32)
        mask = np.uint64((1 << self._bits) - 1)
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
            columns = (words & mask).astype(np.intp)
            stays = (words >> np.uint64(64 - self._precision)) < self._threshold[columns]
            out[start : start + size] = np.where(stays, self._first[columns], self._other[columns])
        return out

    def probability(self, value: int) -> float:
        """P[X = value], from the table itself: what is drawn, not what was meant."""
        columns = len(self._first)
        share = self._threshold.astype(np.float64) / 2.0**self._precision
        return float((share[self._first == value].sum() + (1 - share)[self._other == value].sum()) / columns)


def _alias_table(
    values: npt.NDArray[np.int64], probabilities: npt.NDArray[np.longdouble], bits: int, precision: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Vose's construction on 2**bits columns: each column's first value, other value, and threshold of 2**precision."""
    columns = 1 << bits
    scaled = np.zeros(columns, dtype=np.longdouble)
    scaled[: len(values)] = probabilities * columns
    first = np.zeros(columns, dtype=np.int32)
    first[: len(values)] = values
    other = first.copy()
    small = [i for i in range(columns) if scaled[i] < 1]
    large = [i for i in range(columns) if scaled[i] >= 1]
    share = np.ones(columns, dtype=np.longdouble)
    while small and large:
        less, more = small.pop(), large.pop()
        share[less], other[less] = scaled[less], first[more]
        scaled[more] -= 1 - scaled[less]
        (small if scaled[more] < 1 else large).append(more)
    return first, other, np.round(share * 2.0**precision).astype(np.uint64)
