"""The discrete Gaussian on the integers, from a cryptographic generator, exact and vectorised.

    P[X = k] proportional to exp(-k^2 / (2 sigma^2)),  k in Z

(Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", 2020, definition 1.) One 32-bit word a
value. Write 2^32 P[X = k] = a_k + r_k with a_k whole and 0 <= r_k. The whole parts fill an alias table (Walker 1977,
Vose 1991; here in integers, nothing is rounded) whose columns hold 2^32 units in all: the word's high bits choose a
column, all of it is compared with the column's threshold. What the a_k leave over, a few units in 2^32, stands for
"one of the remainders": such a word is answered from the distribution proportional to r_k, by inversion with as many
further bits as it takes to decide (see `_Remainder`). So no probability is rounded and no tail is cut. That matters
where epsilon is large: cutting the tails at 11 sigma, a mass of 1e-26, already breaks epsilon = 65 at delta = 1e-5.

The words are an AES-256 keystream in counter mode under a key that each call of `draw` takes from the operating
system and forgets: nothing is kept that two processes, a fork included, could share. Exact therefore means: as exact as
that keystream is uniform (a computational assumption, at a distance of n^2 / 2^133 or less for n values a call).

Hides: nothing by itself. Does not hide: which generator was used; there is no seed, so nobody can draw the noise again.
"""

from __future__ import annotations

import decimal
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from splitfl.errors import UsageError

SMALLEST_SIGMA = 1e-3
LARGEST_SIGMA = 4096.0
_WORD = 32
_CHUNK = 1 << 15  # values drawn at a time: words, columns and thresholds then stay in the second-level cache
_ZEROS = memoryview(bytes(_WORD // 8 * _CHUNK))
_FIRST_BITS = 192  # of precision for the remainders: more are needed about once in 2**140 words
_GUARD = 128
_SLACK = 1 << 24  # bound on the error of a running sum in `_Remainder`, in units of its last place; see `_units`

Bytes = Callable[[int], bytes]
"""So many fresh random bytes."""


class Sampler:
    """Draws from the discrete Gaussian with one sigma. Building one costs up to a quarter of a second: see `sampler`.

    Args:
        sigma: in grid units, 0.001 to 4096.

    Raises:
        UsageError: `sigma` out of range.
    """

    distance = 0.0
    """Upper bound on the total variation distance of one value to the exact law, the generator taken as random."""

    def __init__(self, sigma: float) -> None:
        if not SMALLEST_SIGMA <= sigma <= LARGEST_SIGMA:
            raise UsageError(
                f"A discrete Gaussian with sigma {sigma:g} grid units cannot be drawn.",
                expected=f"{SMALLEST_SIGMA:g} to {LARGEST_SIGMA:g}",
                hint="choose a grid step between sigma / 4096 and sigma",
            )
        self.sigma = float(sigma)
        units = _units(self.sigma, _FIRST_BITS)
        whole = [max(0, (unit - 2) >> _FIRST_BITS) for unit in units]  # at most 2 too high, `_units` says
        while not whole[-1]:
            whole.pop()
        self._last = len(whole) - 1
        self._remainder = _Remainder(self.sigma, whole, _FIRST_BITS)
        self._shift = np.uint32(_WORD - (2 * len(whole) - 1).bit_length())
        masses = [*whole[:0:-1], *whole, self._remainder.weight]
        self._threshold, self._jump = _alias_table(masses, int(self._shift))

    def draw(self, count: int) -> npt.NDArray[np.int32]:
        """`count` independent values, int32, in grid units.

        Raises:
            UsageError: a negative count.
        """
        if count < 0:
            raise UsageError(f"{count} values of noise were asked for.", expected="0 or more")
        stream = _keystream()
        out = np.empty(count, dtype=np.int32)
        for start in range(0, count, _CHUNK):
            part = out[start : start + _CHUNK]
            self._choose(np.frombuffer(stream(_WORD // 8 * len(part)), dtype=np.uint32), part)
            for place in np.flatnonzero(part == self._last + 1):
                part[place] = self._remainder.pick(stream)
        return out

    def draw_like(self, shape: Sequence[int]) -> torch.Tensor:
        """Independent values, int32 on the CPU, of this shape, in grid units."""
        return torch.from_numpy(self.draw(math.prod(shape))).view(tuple(shape))

    def mass(self, value: int) -> Fraction:
        """P[X = value], from the tables that are drawn from, to within 2**-160."""
        left = self._remainder.mass(value)
        return left if abs(value) > self._last else left + self._table_mass(value + self._last)

    def probability(self, value: int) -> float:
        """P[X = value], from the tables themselves: what is drawn, not what was meant."""
        return float(self.mass(value))

    def _choose(self, words: npt.NDArray[np.uint32], out: npt.NDArray[np.int32]) -> None:
        """The value each uniform word stands for; `self._last + 1` stands for "one of the remainders"."""
        high = words >> self._shift
        columns = high.astype(np.intp)
        # "wrap" only because numpy checks bounds slowest when it may have to raise; a column is never out of range.
        moves = words >= self._threshold.take(columns, mode="wrap")
        self._jump.take(columns, out=out, mode="wrap")
        np.multiply(out, moves, out=out)
        np.add(out, high.view(np.int32), out=out)
        np.subtract(out, np.int32(self._last), out=out)

    def _table_mass(self, column: int) -> Fraction:
        starts = np.arange(len(self._threshold), dtype=np.int64) << int(self._shift)
        stays = self._threshold.astype(np.int64) - starts
        targets = np.arange(len(self._threshold)) + self._jump
        moved = ((1 << int(self._shift)) - stays)[targets == column].sum()
        return Fraction(int(stays[column]) + int(moved), 1 << _WORD)


@lru_cache(maxsize=64)
def sampler(sigma: float) -> Sampler:
    """The `Sampler` for this sigma, built once in a process. It holds no random state: sharing it is harmless.

    Raises:
        UsageError: `sigma` out of range.
    """
    return Sampler(sigma)


def _keystream() -> Bytes:
    """An endless AES-256-CTR keystream under a fresh key of the operating system, read at most a chunk at a time."""
    encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    return lambda count: encryptor.update(_ZEROS[:count])


def _units(sigma: float, bits: int) -> list[int]:
    """2**32 * P[X = k] for k = 0, 1, ..., in units of 2**-bits, off by less than 2 each.

    The list ends where what is left out is far below one unit. By w(k + 1) = w(k) h q^k with h = exp(-1 / (2 sigma^2))
    and q = h^2, in integers with `_GUARD` more bits. Error: for k up to 2**20 (sigma 4096 at 10,000 bits stays below) a
    weight is off by less than 8 k^2 <= 2**43 last places, their sum by less than 2**64, a unit by less than
    2**(97 - _GUARD) before it is rounded down; running sums are off by less than 2**21 * 2, which is below `_SLACK`.
    """
    one = 1 << (bits + _GUARD)
    context = decimal.Context(prec=(bits + _GUARD) // 3 + 20, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
    with decimal.localcontext(context):
        ratio = int((decimal.Decimal(-1) / (2 * decimal.Decimal(sigma) ** 2)).exp() * one)
    square = ratio * ratio >> (bits + _GUARD)
    weights = [one]
    # P[|X| > t sigma] <= 2 exp(-t^2 / 2): the discrete Gaussian is no wider than the continuous one.
    for _ in range(math.ceil(sigma * math.sqrt(2 * math.log(2) * (bits + _GUARD)))):
        weights.append(weights[-1] * ratio >> (bits + _GUARD))
        ratio = ratio * square >> (bits + _GUARD)
    total = 2 * sum(weights) - one
    return [(weight << (_WORD + bits)) // total for weight in weights]


class _Remainder:
    """The distribution proportional to r_k = 2**32 P[X = k] - whole[|k|], drawn exactly by lazily refined inversion.

    Its total is known exactly: 2**32 less all whole parts. A uniform fraction of that total, known to so many bits, is
    looked up among the running sums of r_0, 2 r_1, 2 r_2, ...; where the bits at hand do not put it on one side of a
    sum beyond doubt, bits are added and the sums computed to as many.
    """

    def __init__(self, sigma: float, whole: Sequence[int], bits: int) -> None:
        self.weight = (1 << _WORD) + whole[0] - 2 * sum(whole)
        self._sigma, self._whole, self._first_bits = sigma, whole, bits
        self._sums: dict[int, list[int]] = {}

    def pick(self, stream: Bytes) -> int:
        """One value, drawn from as many bytes of `stream` as it takes."""
        sign = 1 - 2 * (stream(1)[0] & 1)
        bits, fraction = 0, 0
        while True:
            fresh = bits or self._first_bits
            fraction, bits = fraction << fresh | int.from_bytes(stream(fresh // 8), "big"), bits + fresh
            sums = self._running(bits)
            low, high = fraction * self.weight, (fraction + 1) * self.weight
            size = bisect_right(sums, low)
            above_the_last = size == 0 or low - sums[size - 1] >= _SLACK
            if above_the_last and size < len(sums) and sums[size] - high >= _SLACK:
                return sign * size

    def mass(self, value: int) -> Fraction:
        """r_value / 2**32 to within 2**-160; 0 where it is below that."""
        sums, size = self._running(_FIRST_BITS), abs(value)
        if size >= len(sums):
            return Fraction(0)
        share = Fraction(sums[size] - (sums[size - 1] if size else 0), 1 << (_FIRST_BITS + _WORD))
        return share / 2 if size else share

    def _running(self, bits: int) -> list[int]:
        if bits not in self._sums:
            sums, total = [], 0
            for size, unit in enumerate(_units(self._sigma, bits)):
                whole = self._whole[size] << bits if size < len(self._whole) else 0
                total += (unit - whole) * (2 if size else 1)
                sums.append(total)
            self._sums[bits] = sums
        return self._sums[bits]


def _alias_table(masses: Sequence[int], shift: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Vose's construction in integers: `masses` sum to 2**32 and each column holds 2**shift of them.

    Returns:
        Per column c, the word from which on it stands for another value than c (uint32), and that value less c (int32).
    """
    full, columns = 1 << shift, 1 << (_WORD - shift)
    left = [*masses, *([0] * (columns - len(masses)))]
    small = [column for column in range(columns) if left[column] < full]
    large = [column for column in range(columns) if left[column] >= full]
    stays, jump = [0] * columns, [0] * columns  # a column that is full of itself jumps by 0 from its first word on
    while small:
        less, more = small.pop(), large[-1]
        stays[less], jump[less] = left[less], more - less
        left[more] -= full - left[less]
        if left[more] < full:
            small.append(large.pop())
    starts = np.arange(columns, dtype=np.int64) << shift
    return (starts + np.array(stays, dtype=np.int64)).astype(np.uint32), np.array(jump, dtype=np.int32)
