"""Noise on a sum, of which each party adds a share: the sum is differentially private, no single update has to be.

Of n parties, suppose that k drop out after submitting is over and c collude with the coordinator and take their own
noise off. Then h = n - k - c shares are left that nobody knows, and if each has a variance of sigma_total^2 / h, the
noise on the sum is at least sigma_total. With all n there it is sqrt(n / h) times that: the price of the assumption.

**Dropouts**: a party opens a sum only over at least n - k survivors (`NoisePlan.enough`); with fewer the round is
dropped, and the next attempt carries the same noised updates, because fresh noise would be a second release.
**Colluding parties**: up to c, whatever they send; beyond c the figure printed does not hold.

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
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from splitfl.aggregation.grid import EXTRA, SMALLEST_LEVELS, Grid, Whole
from splitfl.aggregation.sealed import digest
from splitfl.aggregation.sums import RoundTerms, Vector
from splitfl.aggregation.wide_noise import draw
from splitfl.errors import DataError, ResourceError, UsageError
from splitfl.privacy.calibration import gaussian_epsilon, gaussian_sigma

Unit = Literal["party", "record"]
Neighbours = Literal["replace one", "zero out one"]

_BLUR = 4.0
_TAILS = 12.0  # sigmas kept free on the grid: a value beyond them, about 1 in 10^32, would wrap
_FINEST = 64.0  # steps that the noise of one party must be wide at least, for the closeness above
_HALF = (2**32 - 1) // 2


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """How much noise each party adds, and what that promises.

    Raises:
        UsageError: figures out of range, nobody honest left, or noise that does not fit on the grid.
    """

    parties: int
    """n, how many parties the round's terms name."""
    colluders: int
    """c, how many of them may work with the coordinator."""
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
    def _fitted(self) -> tuple[int, float]:
        """Steps kept free for noise, and one party's sigma in steps.

        The ring holds n updates and `_TAILS` sigmas of all parties' noise:

            half = n clip / step + tails sqrt(n / h) (multiplier sensitivity(step) / step + blur)

        in which sensitivity is linear in the step, so that the smallest step follows directly.
        """
        tails = _TAILS * math.sqrt(self.parties / self.honest)
        per_step = self._sensitivity(1.0) - self._sensitivity(0.0)
        steps = _HALF - tails * (self.multiplier * per_step + _BLUR)
        wide = self.parties * self.clip + tails * self.multiplier * self._sensitivity(0.0)
        levels = int(self.clip * steps / wide * (1 - 1e-9)) if 0 < wide < math.inf else 0
        if levels < SMALLEST_LEVELS:
            raise UsageError(
                "So much noise does not fit into sums modulo 2^32.",
                expected="noise that leaves room for the updates",
                hint="a smaller multiplier or norm, or a larger clip",
            )
        reserve = _HALF - self.parties * levels
        step = self._grid(reserve).step
        total = self.multiplier * self._sensitivity(step) / step
        return reserve, math.sqrt((total * total + _BLUR * _BLUR) / self.honest)

    def _grid(self, reserve: int) -> Grid:
        return Grid(clip=self.clip, parties=self.parties, max_weight=1.0, reserve=reserve)

    def _sensitivity(self, step: float) -> float:
        return self._factor * self.norm + step * math.sqrt(self.length) * (1 + 2.0**-15)

    @property
    def reserve(self) -> int:
        """Steps of the grid that are kept free for the noise."""
        return self._fitted[0]

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise that one party adds to each value, in steps."""
        return self._fitted[1]

    @cached_property
    def step(self) -> float:
        """Width of one step, in the unit of the values."""
        return self._grid(self.reserve).step

    @cached_property
    def sensitivity(self) -> float:
        """How far one unit moves the sum, rounding included: L2 norm, in the unit of the values."""
        return self._sensitivity(self.step)

    @property
    def smallest_noise(self) -> float:
        """Standard deviation on each value of the sum with k dropouts and c colluders, in the unit of the values."""
        return self.sigma * self.step * math.sqrt(self.honest)

    def epsilon(self, rounds: int | None = None) -> float:
        """For so many rounds, or all that are planned."""
        released = math.sqrt(self.sigma**2 * self.honest - _BLUR * _BLUR) * self.step
        return gaussian_epsilon(
            self.delta, sensitivity=self.sensitivity, sigma=released, releases=self.rounds if rounds is None else rounds
        )

    def claim(self) -> str:
        """The whole claim in one line: epsilon, delta, unit, relation, adversary, releases."""
        return (
            f"epsilon {math.ceil(self.epsilon() * 1000) / 1000:g} at delta {self.delta:g} for {self.rounds} sums; "
            f"unit: one {self.unit}; neighbours: {self.neighbours}; adversary: whoever sees the sums, with up to "
            f"{self.colluders} of the {self.parties} parties; up to {self.dropouts} dropouts a round, sums with more "
            f"are not opened; sensitivity {self.sensitivity:.4g}, noise on the sum at least {self.smallest_noise:.4g} "
            "a value" + ("" if self.unit == "party" else "; as far as each record's part was clipped to the norm")
        )

    def descriptor(self) -> bytes:
        """Bytes that stand for the plan; part of what the parties of a round agree on."""
        counts = struct.pack("<6Q", self.parties, self.colluders, self.dropouts, self.rounds, self.length, self._factor)
        figures = struct.pack("<4d", self.norm, self.multiplier, self.delta, self.clip)
        return b"noise 1\0" + counts + figures + self.unit.encode("ascii")

    def check(self, terms: RoundTerms) -> None:
        """Refuse the terms of a round that this was not planned for.

        Raises:
            UsageError: other parties, length or clip, or more rounds than were planned.
        """
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
    )  # fmt: skip


def grid_for(terms: RoundTerms, noise: NoisePlan | None) -> Grid:
    """The grid of a round: room for one update of each party, and for the noise."""
    return Grid(
        clip=terms.clip,
        parties=len(terms.parties),
        max_weight=terms.max_weight,
        reserve=noise.reserve if noise is not None else 0,
    )


class Noiser:
    """Encodes and noises a party's update once a round, and gives the same numbers to each further attempt.

    Args:
        folder: where the noised update of the latest round is kept, in files of mode 0600; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, terms: RoundTerms, grid: Grid, plan: NoisePlan, vector: Vector, weight: float, out: Whole) -> None:
        """The noised update on the grid, into `out` (int32 [d + EXTRA]).

        Raises:
            DataError: values that cannot be sent; a weight other than the largest, which would tell how much data there
                is; another update in the same round.
            ResourceError: it cannot be kept.
        """
        if weight != terms.max_weight:
            raise DataError(
                f"With noise, a weight of {weight:g} would itself say something about the data.",
                expected=f"the largest weight, {terms.max_weight:g}, at every party",
            )
        federation = digest(terms.federation.encode("utf-8")).hex()[:16]
        path = self._folder / f"noised-{federation}-{terms.round}"
        stamp = digest(terms.layout.encode("utf-8"), plan.descriptor(), struct.pack("<d", weight), vector.tobytes())
        if self._load(path, stamp, out):
            return
        grid.encode(_shortened(vector, plan.norm) if plan.unit == "party" else vector, weight, out)
        values = out[:-EXTRA].view(np.uint32)
        values += draw(plan.sigma, len(values)).astype(np.uint32)  # modulo 2^32
        self._keep(path, stamp, out)
        for other in self._folder.glob(f"noised-{federation}-*"):
            if other != path:
                other.unlink(missing_ok=True)

    def _load(self, path: Path, stamp: bytes, out: Whole) -> bool:
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ResourceError(f"The noised update {path} cannot be read: {error.strerror}.") from error
        if found[: len(stamp)] != stamp or len(found) != len(stamp) + out.nbytes:
            raise DataError(
                "Another update was noised in this round already; a second one would be a second release.",
                expected="the same update at every attempt of a round",
                hint="keep the update until the round is over",
            )
        out[:] = np.frombuffer(found, dtype="<i4", offset=len(stamp))
        return True

    def _keep(self, path: Path, stamp: bytes, out: Whole) -> None:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(stamp)
                file.write(out.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise ResourceError(f"The noised update cannot be kept in {path.parent}: {error.strerror}.") from error


def _shortened(vector: Vector, norm: float) -> Vector:
    """`vector`, scaled down to an L2 norm of at most `norm`."""
    squares = (np.dot(part, part) for part in _pieces(vector))
    length = math.sqrt(float(sum(squares)))
    if not math.isfinite(length):
        raise DataError("The update holds a value that is not finite.", expected="finite values only")
    # a little below: scaling in float32 rounds each value by up to 2^-24 of itself
    return vector if length <= norm * (1 - 1e-6) else vector * np.float32(norm * (1 - 1e-6) / length)


def _pieces(vector: Vector) -> list[np.ndarray]:
    size = 1 << 20
    return [vector[start : start + size].astype(np.float64) for start in range(0, len(vector), size)]
