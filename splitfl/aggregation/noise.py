"""Noise on a sum, of which each party adds a share: the sum is differentially private, no single update has to be.

Of n parties, suppose that k drop out after submitting is over and c collude with the coordinator and take their own
noise off. Then h = n - k - c shares are left that nobody knows, and if each has a variance of sigma_total^2 / h, the
noise on the sum is at least sigma_total. With all n there it is sqrt(n / h) times that: the price of the assumption.

**Dropouts**: a party opens a sum only over at least n - k survivors (`NoisePlan.enough`); with fewer the round is
dropped, and the next attempt carries the same noised updates, because fresh noise would be a second release.
**Colluding parties**: up to c, whatever they send; beyond c the figure printed does not hold. Masks hold against them
and the coordinator together. Where the parties share a key (`Space.shared_key`) that is so without the coordinator
only: with one party it reads each update, on which there is one party's share and no more; `NoisePlan.epsilon_alone` is
the bound that this share gives by itself.
**One sum a round**: two sums of one round over different parties carry the same noise, and their difference is the
updates of those who are in one of them, with their shares alone. `splitfl.aggregation.noiser` sees to it that a party
helps to open one.

What is released is q + Z with q a whole-numbered vector and Z a discrete Gaussian (`splitfl.aggregation.wide_noise`).
It is at least as private as a continuous Gaussian with variance sigma^2 - b^2, b = `_BLUR` steps: drawing a whole
number around N(q, sigma^2 - b^2) with weights exp(-distance^2 / (2 b^2)) gives q + Z, up to a factor of
1 +- 9 exp(-2 pi^2 b^2) a value (Poisson summation again; below 1e-135). So the bound for the continuous Gaussian,
which is exact for any number of releases (Balle and Wang 2018), is one for this. It needs no sampling argument: who
takes part is known to all.

Sensitivity, in the L2 norm: one unit moves the sum of the updates by at most `norm` (zero out one: its contribution
becomes 0) or twice that (replace one). Rounding with the same coins adds less than one step a value, so
step * sqrt(d) is added.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from splitfl.aggregation.grid import SMALLEST_LEVELS, Grid
from splitfl.aggregation.lattice import SCHEMES
from splitfl.aggregation.sums import RoundTerms
from splitfl.errors import UsageError
from splitfl.privacy.calibration import gaussian_epsilon, gaussian_sigma

Unit = Literal["party", "record"]
Neighbours = Literal["replace one", "zero out one"]

_BLUR = 4.0
_TAILS = 12.0  # sigmas kept free on the grid: a value beyond them, about 1 in 10^32, would wrap
_FINEST = 64.0  # steps that the noise of one party must be wide at least, for the closeness above
_HALF = (2**32 - 1) // 2


@dataclass(frozen=True)
class Space:
    """The whole numbers that a way of summing has room for."""

    name: str
    largest: int = _HALF
    """Largest magnitude of a sum."""
    finest: int = _HALF
    """Most steps between 0 and the clip."""
    shared_key: bool = False
    """Whether every party could read every update, if the coordinator gave it away."""


MASKED = Space("mask")
_ENCRYPTED: dict[str, Space] = {
    name: Space(name, scheme.largest, scheme.finest, shared_key=True) for name, scheme in SCHEMES.items()
}


def space_of(sum_name: str) -> Space:
    """Where a way of summing counts, by its name."""
    return _ENCRYPTED.get(sum_name, MASKED)


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """How much noise each party adds, and what that promises.

    Raises:
        UsageError: figures out of range, nobody honest left, or noise that does not fit on the grid.
    """

    parties: int
    """n, how many parties the round's terms name."""
    colluders: int
    """c, how many of them may work together: with the coordinator as well, unless the parties share a key."""
    dropouts: int
    """k, how many may be missing from the sum."""
    norm: float
    """Largest L2 norm of one unit's part of an update. For the unit ``party`` updates are scaled down to it here; for
    ``record`` whoever makes the update has to have clipped each record's part to it."""
    multiplier: float
    """Noise on the sum over its sensitivity, at the least."""
    rounds: int
    """How many sums are released."""
    delta: float
    clip: float
    """Largest magnitude of one value, as in the terms."""
    length: int
    """d, values in one update, as in the terms."""
    unit: Unit = "party"
    neighbours: Neighbours = "replace one"
    space: Space = MASKED

    def __post_init__(self) -> None:
        counts = (self.parties, self.rounds, self.length)
        figures = (self.norm, self.multiplier, self.clip)
        sensible = min(counts) >= 1 and min(self.colluders, self.dropouts) >= 0
        if not sensible or not all(0 < figure < math.inf for figure in figures) or not 0 < self.delta < 1:
            raise UsageError(
                "Noise cannot be planned with these figures.",
                expected="finite figures above 0, whole counts, delta between 0 and 1",
            )
        if self.unit not in ("party", "record") or self.neighbours not in ("replace one", "zero out one"):
            raise UsageError("Noise for an unknown unit or relation.", expected="see NoisePlan")
        if self.honest < 1:
            raise UsageError(
                f"Of {self.parties} parties, {self.colluders} that collude and {self.dropouts} that drop out leave "
                "nobody whose noise could be counted on.",
                expected="at least one left",
            )
        if self.sigma < _FINEST:
            raise UsageError(
                f"Noise of {self.sigma:.3g} steps is too fine for the grid.",
                expected=f"at least {_FINEST:g} steps a party",
                hint="a smaller clip, or a larger multiplier",
            )

    @property
    def honest(self) -> int:
        """h, whose noise is counted on."""
        return self.parties - self.colluders - self.dropouts

    @property
    def enough(self) -> int:
        """The fewest survivors over which the sum may be opened."""
        return self.parties - self.dropouts

    @property
    def _factor(self) -> int:
        return 2 if self.neighbours == "replace one" else 1

    @cached_property
    def _fitted(self) -> tuple[int, int, float]:
        """Steps between 0 and the clip, steps kept free for noise, and one party's sigma in steps.

        A sum holds n updates and `_TAILS` sigmas of all parties' noise:

            largest = n clip / step + tails sqrt(n / h) (multiplier sensitivity(step) / step + blur)

        in which sensitivity is linear in the step, so that the smallest step follows directly. Where a way of summing
        has a finest step that is wider, that one is taken, and what is kept free is what it needs.
        """
        tails = _TAILS * math.sqrt(self.parties / self.honest)
        per_step = self._sensitivity(1.0) - self._sensitivity(0.0)
        steps = self.space.largest - tails * (self.multiplier * per_step + _BLUR)
        wide = self.parties * self.clip + tails * self.multiplier * self._sensitivity(0.0)
        levels = int(self.clip * steps / wide * (1 - 1e-9)) if 0 < wide < math.inf else 0
        if levels < SMALLEST_LEVELS:
            raise UsageError(
                f"So much noise does not fit into sums of magnitudes up to {self.space.largest} ({self.space.name}).",
                expected="noise that leaves room for the updates",
                hint="a smaller multiplier or norm, or a larger clip"
                + (", or a sum with masks, which has more room" if self.space.largest < _HALF else ""),
            )
        reserve = self.space.largest - self.parties * levels
        if levels > self.space.finest:
            levels = self.space.finest
            reserve = math.ceil(tails * (self._total(levels) + _BLUR))
        total = self._total(levels)
        return levels, reserve, math.sqrt((total * total + _BLUR * _BLUR) / self.honest)

    def _total(self, levels: int) -> float:
        """Noise that the sum has to have, in steps."""
        step = self.clip / levels
        return self.multiplier * self._sensitivity(step) / step

    def grid(self, max_weight: float = 1.0) -> Grid:
        """Room for an update of each party, and for the noise."""
        levels, reserve, _ = self._fitted
        return Grid(
            clip=self.clip, parties=self.parties, max_weight=max_weight, reserve=reserve,
            modulus=2 * (self.parties * levels + reserve) + 1,
        )  # fmt: skip

    def _sensitivity(self, step: float) -> float:
        return self._factor * self.norm + step * math.sqrt(self.length) * (1 + 2.0**-15)

    @property
    def reserve(self) -> int:
        """Steps of the grid that are kept free for the noise."""
        return self._fitted[1]

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise that one party adds to each value, in steps."""
        return self._fitted[2]

    @cached_property
    def step(self) -> float:
        """Width of one step, in the unit of the values."""
        return self.clip / self._fitted[0]

    @cached_property
    def sensitivity(self) -> float:
        """How far one unit moves the sum, rounding included: L2 norm, in the unit of the values."""
        return self._sensitivity(self.step)

    @property
    def smallest_noise(self) -> float:
        """Standard deviation on each value of the sum with k dropouts and c colluders, in the unit of the values."""
        return self.sigma * self.step * math.sqrt(self.honest)

    def epsilon(self, rounds: int | None = None) -> float:
        """Of so many sums, or of all that are planned."""
        return self._epsilon(self.honest, self.rounds if rounds is None else rounds)

    def epsilon_alone(self) -> float:
        """Of as many updates of one party, each under that party's share of the noise alone."""
        return self._epsilon(1, self.rounds)

    def _epsilon(self, shares: int, releases: int) -> float:
        released = math.sqrt(self.sigma**2 * shares - _BLUR * _BLUR) * self.step
        return gaussian_epsilon(self.delta, sensitivity=self.sensitivity, sigma=released, releases=releases)

    def claim(self) -> str:
        """The whole claim in one line: epsilon, delta, unit, relation, adversary, releases."""
        return (
            f"epsilon {_up(self.epsilon())} at delta {self.delta:g} for {self.rounds} sums; "
            f"unit: one {self.unit}; neighbours: {self.neighbours}; adversary: whoever sees the sums, with up to "
            f"{self.colluders} of the {self.parties} parties{self._apart()}; up to {self.dropouts} dropouts a round, "
            f"sums with more are not opened; sensitivity {self.sensitivity:.4g}, noise on the sum at least "
            f"{self.smallest_noise:.4g} a value"
            + ("" if self.unit == "party" else "; as far as each record's part was clipped to the norm")
        )

    def _apart(self) -> str:
        if not self.space.shared_key:
            return ""
        return (
            " but without the coordinator (which with any party reads each update, under one share of the noise: "
            f"epsilon {_up(self.epsilon_alone())})"
        )

    def descriptor(self) -> bytes:
        """Bytes that stand for the plan; part of what the parties of a round agree on."""
        counts = struct.pack("<6Q", self.parties, self.colluders, self.dropouts, self.rounds, self.length, self._factor)
        figures = struct.pack("<4d", self.norm, self.multiplier, self.delta, self.clip)
        where = b"" if self.space == MASKED else b" " + self.space.name.encode("ascii")
        return b"noise 1\0" + counts + figures + self.unit.encode("ascii") + where

    def check(self, terms: RoundTerms, space: Space = MASKED) -> None:
        """Refuse the terms of a round that this was not planned for.

        Raises:
            UsageError: another way of summing, other parties, length or clip, or more rounds than were planned.
        """
        if space != self.space:
            raise UsageError(f"Noise was planned for sums of {self.space.name}, and this is one of {space.name}.")
        planned, found = (self.parties, self.length, self.clip), (len(terms.parties), terms.length, terms.clip)
        if planned != found:
            raise UsageError(
                f"Noise was planned for {planned[0]} parties, {planned[1]} values and a clip of {planned[2]:g}; "
                f"the round has {found[0]}, {found[1]} and {found[2]:g}."
            )
        if terms.round >= self.rounds:
            raise UsageError(
                f"Round {terms.round} is beyond the {self.rounds} rounds that the noise was planned for.",
                hint="plan for more rounds from the start; epsilon grows with them",
            )


def plan_noise(
    terms: RoundTerms,
    *,
    norm: float,
    rounds: int,
    delta: float,
    epsilon: float | None = None,
    multiplier: float | None = None,
    colluders: int = 0,
    dropouts: int = 0,
    unit: Unit = "party",
    neighbours: Neighbours = "replace one",
    space: Space = MASKED,
) -> NoisePlan:
    """The plan for rounds with these terms, from an epsilon for all rounds or from a multiplier.

    Raises:
        UsageError: both or neither are given; as `NoisePlan`.
    """
    if (epsilon is None) == (multiplier is None):
        raise UsageError("How much noise is wanted is not said, or said twice.", expected="epsilon or multiplier")
    if multiplier is None and epsilon is not None:
        multiplier = gaussian_sigma(epsilon, delta, sensitivity=1.0, releases=rounds) * (1 + 1e-12)
    return NoisePlan(
        parties=len(terms.parties), colluders=colluders, dropouts=dropouts, norm=norm, multiplier=multiplier or 0.0,
        rounds=rounds, delta=delta, clip=terms.clip, length=terms.length, unit=unit, neighbours=neighbours,
        space=space,
    )  # fmt: skip


def grid_for(terms: RoundTerms, noise: NoisePlan | None) -> Grid:
    """The grid of a round that is summed modulo 2^32: room for one update of each party, and for the noise."""
    if noise is not None:
        return noise.grid(terms.max_weight)
    return Grid(clip=terms.clip, parties=len(terms.parties), max_weight=terms.max_weight)


def _up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1000) / 1000:g}"
