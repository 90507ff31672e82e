"""Values as whole numbers, so that a sum of them is exact and can be masked or encrypted.

Each of n parties multiplies its clipped update by its share of the largest weight, f = weight / max_weight, and rounds
it to a grid. With `half` = (modulus - 1) // 2, the largest magnitude that a signed number of the ring can have,

    levels = (half - reserve) // n,   step = clip / levels,   |f * value / step| <= levels

so n full updates at the largest weight cannot wrap. `reserve` is room for noise that is added on the grid.

Rounding is stochastic and unbiased: x + u is rounded to the nearest, with u uniform on 2^15 points between -1/2 and
1/2, from an AES keystream; the mean of what is drawn is off by no more than 2^-16 of a step.

The weight does not share the grid of the values: it is a fixed-point number in two further coordinates of `bits`
binary digits each, so that ten rows under a cap of a thousand lose nothing. The last `CHECKS` coordinates are 1 at each
party: their sums are the number of parties, or what was opened is not the sum (a sum that is still masked, or opened
with a wrong key, passes with probability modulus^-4).

Legend: d values of one update, n parties; an encoded update has d + `EXTRA` whole numbers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from splitfl.aggregation.streams import KEY_BYTES, Keystream
from splitfl.aggregation.sums import Vector
from splitfl.errors import DataError, UsageError, WireError

WEIGHTS = 2
CHECKS = 4
EXTRA = WEIGHTS + CHECKS
"""Coordinates after the values: the weight's high and low digits, then the check coordinates."""

_CHUNK = 1 << 16  # values: what is worked on stays in the second-level cache
_COIN = 2.0**16  # a step, in the unit of the coins
_MAGIC = 1.5 * 2.0**52 * _COIN  # added to a float64, the low bits of the sum are whole steps, rounded to the nearest
SMALLEST_LEVELS = 1 << 12
"""Fewer steps for a value make no update."""

Whole = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the values of one round's updates may lie.

    Args:
        clip: largest magnitude of a value; above 0.
        parties: n, how many updates a sum may hold.
        max_weight: largest weight of one party.
        modulus: size of the ring in which sums are computed; at most 2^32.
        reserve: magnitude kept free for noise, in steps.

    Raises:
        UsageError: a figure out of range, or too many parties for the ring.
    """

    clip: float
    parties: int
    max_weight: float
    modulus: int = 1 << 32
    reserve: int = 0

    def __post_init__(self) -> None:
        _need_positive("clip", self.clip)
        _need_positive("largest weight", self.max_weight)
        if self.parties < 1 or not 4 <= self.modulus <= 1 << 32 or self.reserve < 0:
            raise UsageError(
                f"A sum of {self.parties} updates modulo {self.modulus} with {self.reserve} kept free makes no sense.",
                expected="1 party or more, a modulus of at most 2^32, a reserve of 0 or more",
            )
        if self.levels < SMALLEST_LEVELS:
            raise UsageError(
                f"{self.parties} updates do not fit into sums modulo {self.modulus}, {self.reserve} kept free.",
                expected=f"at least {SMALLEST_LEVELS} steps a value",
                hint="fewer parties in one round, or less noise",
            )

    @cached_property
    def half(self) -> int:
        """Largest magnitude of a sum."""
        return (self.modulus - 1) // 2

    @cached_property
    def levels(self) -> int:
        """Largest magnitude of one party's value, in steps."""
        return (self.half - self.reserve) // self.parties

    @cached_property
    def step(self) -> float:
        """Width of one step, in the unit of the values (at the largest weight)."""
        return self.clip / self.levels

    @cached_property
    def bits(self) -> int:
        """Binary digits of the weight in each of its two coordinates."""
        return self.levels.bit_length() - 1

    def weight_units(self, weight: float) -> int:
        """`weight` as a whole number of max_weight / 2^(2 `bits`), at least 1.

        Raises:
            DataError: not in (0, max_weight].
        """
        check_weight(weight, self.max_weight)
        return max(1, round(weight / self.max_weight * (1 << 2 * self.bits)))

    def encode(self, vector: Vector, weight: float, out: Whole | None = None) -> Whole:
        """The update as it is summed.

        Args:
            vector: float32 [d]; what is beyond the clip is cut to it.
            weight: above 0, at most the largest.
            out: int32 [d + EXTRA] to write to.

        Returns:
            int32 [d + EXTRA], signed, each of a magnitude of at most `levels`.

        Raises:
            DataError: a value is not finite, or the weight is out of range.
        """
        units = self.weight_units(weight)
        count = len(vector)
        whole = np.empty(count + EXTRA, dtype=np.int32) if out is None else out
        self._round(vector, units / (1 << 2 * self.bits), whole)
        whole[count] = units >> self.bits
        whole[count + 1] = units & ((1 << self.bits) - 1)
        whole[count + WEIGHTS :] = 1
        return whole

    def check(self, sums: Whole, parties: int) -> float:
        """Whether this can be the sum of so many encoded updates.

        Args:
            sums: int32 [d + EXTRA], the residues nearest to 0.
            parties: how many updates are in it.

        Returns:
            The sum of the weights, in units of the largest.

        Raises:
            WireError: it cannot.
        """
        count = len(sums) - EXTRA
        high, low, *checks = (int(value) for value in sums[count:])
        units, full = (high << self.bits) + low, 1 << 2 * self.bits
        if any(check != parties for check in checks) or not parties <= units <= parties * full:
            raise WireError(
                f"What was opened is not the sum of {parties} updates.",
                expected=f"check coordinates equal to {parties}, and a weight of at most {parties} parties",
                hint="the round is dropped: a party or the coordinator did not do its part",
            )
        share = units / full
        # each party's rounding moves a value by less than one step
        limit = share * self.levels + parties + self.reserve
        if count and max(-int(sums[:count].min()), int(sums[:count].max())) > limit:
            raise WireError(
                "The mean that was opened has values beyond the clip.",
                expected=f"magnitudes up to {self.clip:g}",
                hint="the round is dropped: a party sent more than the clip allows",
            )
        return share

    def decode(self, sums: Whole, parties: int) -> tuple[Vector, float]:
        """Mean (float32 [d]) and total weight, from the sum of encoded updates; arguments and errors as in `check`."""
        share = self.check(sums, parties)
        mean = np.empty(len(sums) - EXTRA, dtype=np.float32)
        np.multiply(sums[:-EXTRA], self.step / share, out=mean, dtype=np.float64, casting="same_kind")
        if not self.reserve:  # rounding may have gone beyond by a step; noise may go anywhere
            np.clip(mean, -self.clip, self.clip, out=mean)
        return mean, share * self.max_weight

    def _round(self, vector: Vector, share: float, whole: Whole) -> None:
        scale = share * self.levels / self.clip * _COIN
        size = min(_CHUNK, max(1, len(vector)))
        floats, thrown = np.empty(size, dtype=np.float64), np.empty(size, dtype=np.float64)
        stream, top = Keystream(os.urandom(KEY_BYTES), 2 * size), float32_within(self.clip)
        for start in range(0, len(vector), size):
            part = within(vector[start : start + size], top)
            held, coins = floats[: len(part)], thrown[: len(part)]
            sides = stream.next(2 * len(part)).view(np.int16)
            sides |= 1  # odd, so that no sum lies halfway between two steps
            coins[:] = sides
            held[:] = part
            held *= scale
            held += coins
            held += _MAGIC
            # the low 32 bits: the magic number has none of its own there
            np.copyto(whole[start : start + len(part)], held.view(np.int64), casting="unsafe")


def float32_within(clip: float) -> np.float32:
    """The largest float32 that is not beyond `clip`."""
    nearest = np.float32(clip)
    # as float: numpy would round the clip to float32 before it compares
    return nearest if float(nearest) <= clip else np.nextafter(nearest, np.float32(0))


def within(part: Vector, top: np.float32) -> Vector:
    """`part`, cut to magnitudes of at most `top`; itself if nothing is beyond.

    Raises:
        DataError: a value is not finite.
    """
    low, high = part.min(), part.max()  # NaN wins in both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(
            "The update holds a value that is not finite.",
            expected="finite values only",
            hint="training diverged: a lower learning rate, or gradient clipping",
        )
    return part if -top <= low and high <= top else np.clip(part, -top, top)


def check_vector(vector: Vector, length: int) -> None:
    """Refuse what is not float32 [length].

    Raises:
        DataError: another shape or dtype.
    """
    if vector.dtype != np.float32 or vector.shape != (length,):
        raise DataError(
            f"The update is {vector.dtype} of shape {vector.shape}.", expected=f"float32 of shape ({length},)"
        )


def check_weight(weight: float, largest: float) -> None:
    """Refuse a weight that is not in (0, largest].

    Raises:
        DataError: it is not.
    """
    if not 0 < weight <= largest:
        raise DataError(
            f"The weight {weight:g} cannot be used.",
            expected=f"above 0 and at most {largest:g}",
            hint="the largest weight of one party is part of the round's terms",
        )


def _need_positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"The {what} {value:g} cannot be used.", expected="a finite number above 0")
