"""How DP-SGD on an adapter is planned and accounted for: noise from epsilon, epsilon from noise, and the ledger's rho.

The event is that of `party.private_sgd`: so many steps of the Gaussian mechanism on Poisson samples. Epsilon is Opacus'
(PRV: Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy", 2021; and RDP), for neighbours that add
or remove one unit. The ledger adds up rho for neighbours that replace one; see `adapter_rho`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dp_accounting  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped, unused-ignore]
from opacus.accountants import PRVAccountant, RDPAccountant

from splitfl.errors import UsageError
from splitfl.privacy.calibration import Claim, gaussian_delta

ADVERSARY = "whoever gets the adapter"
TAIL = 1e-10
"""`adapter_rho` holds but for this much of delta, for each adapter."""
_ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(11, 128), 192, 256, 512, 1024, 4096]
_LARGEST_TABLE = 3e6
_LARGEST_NOISE = 1e5


def epsilon_of(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon at `delta` of that many steps; add or remove one unit. The smaller of Opacus' RDP and PRV bounds.

    Args:
        noise_multiplier: standard deviation of the noise over the clip.
        sample_rate: probability with which a unit joins a step.
        steps: how many.
        delta: above 0, below 1.
    """
    epsilon = _by_rdp(noise_multiplier, sample_rate, steps, delta)
    error = max(0.002, 0.01 * min(1.0, epsilon))  # how far above the true epsilon the PRV bound may lie
    if (epsilon + 4) / error * math.sqrt(steps * math.log(1 / delta)) < _LARGEST_TABLE:
        with contextlib.suppress(ValueError, RuntimeError, OverflowError):  # beyond what its numerics can do
            other = _epsilon_by(PRVAccountant(), noise_multiplier, sample_rate, steps, delta, eps_error=error)
            epsilon = min(epsilon, other) if other >= 0 else epsilon
    return epsilon


def _by_rdp(noise: float, rate: float, steps: int, delta: float) -> float:
    return _epsilon_by(RDPAccountant(), noise, rate, steps, delta, alphas=_ORDERS)


def _epsilon_by(accountant: Any, noise: float, rate: float, steps: int, delta: float, **options: Any) -> float:
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # logarithms of 0 in tables, and orders at the end of the list
        return float(accountant.get_epsilon(delta, **options))


def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """A noise multiplier that keeps `steps` steps within (epsilon, delta), the smallest to about one percent.

    Raises:
        UsageError: no noise does.
    """
    high = 0.25
    while _by_rdp(high, sample_rate, steps, delta) > epsilon:
        high *= 2
        if high > _LARGEST_NOISE:
            raise UsageError(
                f"No noise up to {_LARGEST_NOISE:g} times the clip keeps {steps} steps at sampling rate "
                f"{sample_rate:.3g} within epsilon {epsilon:g} at delta {delta:g}.",
                hint="allow a larger epsilon, or take fewer steps or smaller batches",
            )
    low = high / 4  # RDP asks for less than twice the noise that is needed; and 0.06 is no noise at all
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_of(middle, sample_rate, steps, delta) <= epsilon else (middle, high)
    return high


def adapter_rho(noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """rho for the ledger, which adds rho up and turns the sum into epsilon: neighbours replace one unit.

    Sampled noise has no good rho for all orders. But if the adapter's delta(epsilon) lies below that of a Gaussian
    mechanism of mu and `TAIL` more, at every epsilon, then the adapter can be made from that mechanism's output except
    with probability `TAIL` (Dong, Roth and Su, "Gaussian Differential Privacy", 2022, theorem 2.10): rho = mu^2 / 2.
    The smallest such mu is looked for, on a grid on which one curve lies below the other's next point. So an epsilon
    that the ledger shows holds at its delta plus `TAIL` for each adapter.
    """
    plain = 2 * math.sqrt(steps) / noise_multiplier  # mu of all steps if every unit were in each
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant.compose(step, steps)
    end = float(accountant.get_epsilon(TAIL))
    if not math.isfinite(end):
        return plain**2 / 2
    grid = np.linspace(0.0, end, 257)
    reached = [float(accountant.get_delta(epsilon)) for epsilon in grid[:-1]]

    def covers(mu: float) -> bool:
        bounds = (gaussian_delta(float(epsilon), sensitivity=mu, sigma=1.0) for epsilon in grid[1:])
        return all(delta <= TAIL + (1 - TAIL) * bound for delta, bound in zip(reached, bounds, strict=True))

    low, high = 0.0, plain
    if not covers(high):
        return plain**2 / 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if covers(middle) else (middle, high)
    return high**2 / 2


@dataclass(frozen=True, kw_only=True)
class AdapterClaim(Claim):
    """A `Claim` about an adapter: with the number of steps, and in the words of its unit."""

    whose: Literal["row", "person"]
    steps: int
    sample_rate: float

    def _terms(self, releases: str) -> str:
        return (
            f"delta {self.delta:g}; unit: one {self.whose}; neighbours: {self.neighbours}; adversary: "
            f"{self.adversary}; releases: this one adapter, after {self.steps} steps at sampling rate "
            f"{self.sample_rate:.4g}"
        )

    def sentence(self) -> str:
        """The whole claim in one line."""
        return f"{self.mechanism} on the {self.channel}: {self.bound(1)}"

    __str__ = sentence


@dataclass(frozen=True, kw_only=True)
class PrivatePlan:
    """How a run protects its adapter, settled before anything is trained."""

    noise_multiplier: float
    """Standard deviation of the noise over the clip."""
    clip: float
    """Largest norm of a unit's gradient."""
    sample_rate: float
    steps: int
    units: int
    unit: Literal["row", "person"]
    delta: float
    epsilon: float
    freeze_a: bool = False

    @property
    def expected(self) -> float:
        """Units in a step, on average."""
        return self.sample_rate * self.units

    @property
    def claim(self) -> AdapterClaim:
        """What is promised, with everything that belongs to it."""
        return AdapterClaim(
            mechanism="DP-SGD",
            channel="adapter",
            unit="record",
            neighbours="add or remove one",
            adversary=ADVERSARY,
            sensitivity=self.clip,
            sigma=self.noise_multiplier * self.clip,
            delta=self.delta,
            releases_planned=1,
            epsilon_one=self.epsilon,
            epsilon_all=self.epsilon,
            formal=True,
            whose=self.unit,
            steps=self.steps,
            sample_rate=self.sample_rate,
        )

    @property
    def mechanism(self) -> str:
        """In a few words, for the ledger."""
        return f"DP-SGD, noise {self.noise_multiplier:.6g}, rate {self.sample_rate:.6g}, {self.steps} steps"

    def lines(self) -> list[tuple[str, str]]:
        """What is said of it before the run: label and text."""
        often = f"each {self.unit} of {self.units} with probability {self.sample_rate:.4g}, {self.expected:.4g} a step"
        ratio = f"clip / (noise x clip / expected batch) = {self.expected / self.noise_multiplier:.3g}"
        return [
            ("DP-SGD", f"{self.steps} steps; {often}; clip {self.clip:g}; noise {self.noise_multiplier:.4g} x clip"),
            ("signal to noise", f"{ratio} for one value, were all of a step's gradients the same"),
        ]


def plan_private(
    *, units: Sequence[str], unit: Literal["row", "person"], batch: int, max_steps: int, epochs: float, clip: float,
    delta: float, noise_multiplier: float | None, epsilon: float | None, freeze_a: bool = False,
) -> PrivatePlan:  # fmt: skip
    """Work out the noise from epsilon, or epsilon from the noise.

    Args:
        units: for each example, whose it is.
        unit: what they are.
        batch: units in a step, on average.
        max_steps: above 0 overrides `epochs`.
        epochs: how often a unit is in a step, on average.
        clip: largest norm of a unit's gradient.
        delta: for the bound.
        noise_multiplier: or None, to be worked out from `epsilon`.
        epsilon: or None.
        freeze_a: keep the first matrix of each pair as it was drawn.

    Raises:
        UsageError: a delta that allows to give a unit away, or an epsilon that no noise gives.
    """
    count = len(set(units))
    if delta >= 1 / count:
        raise UsageError(
            f"--dp-delta {delta:g} with {count} {unit}s: a mechanism that gives one of them away whole would pass.",
            expected=f"far below 1 / {count}",
        )
    rate = min(1.0, batch / count)
    steps = max_steps if max_steps > 0 else math.ceil(epochs / rate)
    if noise_multiplier is None:
        assert epsilon is not None  # noqa: S101  the settings saw to it
        noise_multiplier = noise_for(epsilon, delta, rate, steps)
    return PrivatePlan(
        noise_multiplier=noise_multiplier,
        clip=clip,
        sample_rate=rate,
        steps=steps,
        units=count,
        unit=unit,
        delta=delta,
        epsilon=epsilon_of(noise_multiplier, rate, steps, delta),
        freeze_a=freeze_a,
    )
