"""A lower bound on epsilon from what an attacker guesses, beside the upper bound that is claimed.

    coins      each of m canaries is put in, or not, by a fair coin
    train      once, with those that are in; the attacker watches and gives every canary a score
    guess      the m / 4 surest: the highest scores as in, the lowest as out; the number is fixed beforehand
    bound      so many right guesses contradict every claim below some epsilon                  (`dp_bounds`)

(Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023; the attacker's canaries are as strong
as they come: gradients of one coordinate each, which only `party.dp_audit` can put in.) A lower bound above the claim
proves a mistake, in code or in accounting. A lower bound of 0 proves nothing: the ceiling for m = 1000 at delta 1e-5 is
5.8 with every guess right, and a sound run of epsilon 4 shows 1 or 2.

`audit_gauss` does the same for the mechanism on activations, where releases are cheap and independent, so that plain
error rates do; its claim is the ledger's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from splitfl.audit.attacks.dp_bounds import contradicts, one_run_epsilon, one_run_mu, pair_bounds, profile_inverse
from splitfl.errors import UsageError
from splitfl.link import decoded
from splitfl.privacy.calibration import gaussian_epsilon, zcdp_epsilon, zcdp_rho
from splitfl.wire.coding import Coded

SIGNIFICANCE = 0.05
GUESSED = 4
"""Guesses are m / 4: half of them "in", half "out"."""
_LEAST = 40
_FAR = 1e3
_TAIL = (1.5, 2.0, 2.5, 3.0)  # sigmas above the mean of the record that is not there


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """What is claimed of a mechanism, for neighbours that add or remove one unit; an upper bound."""

    epsilon: float
    """At `delta`, as it is printed and booked."""
    delta: float
    profile: tuple[tuple[float, float], ...]
    """Pairs (epsilon, delta) that the accounting says hold all at once."""


@dataclass(frozen=True, kw_only=True)
class DpAudit:
    """Lower bounds from one run, each at 95 % taken by itself, beside what was claimed."""

    claimed: Claimed
    canaries: int
    guesses: int
    right: int
    epsilon: float
    """Contradicted at `claimed.delta`, whatever the mechanism is (Steinke, Nasr and Jagielski)."""
    mu: float
    """Contradicted mu of Gaussian differential privacy (Mahloujifar, Melis and Chaudhuri)."""
    profile_contradicted: bool
    """Whether the claimed profile as a whole is contradicted (same paper)."""
    epsilon_pair: float
    mu_pair: float
    """From the error rates at a fixed threshold; they hold if errors at different canaries are independent."""

    @property
    def epsilon_of_mu(self) -> float:
        """`mu` as an epsilon at the claimed delta: what it would be were the mechanism Gaussian."""
        return gaussian_epsilon(self.claimed.delta, sensitivity=self.mu, sigma=1.0) if self.mu > 0 else 0.0

    @property
    def violated(self) -> bool:
        """Whether the claim is contradicted: the build must fail. A sound one is, in up to 2 x 5 % of all runs."""
        return self.epsilon > self.claimed.epsilon or self.profile_contradicted

    @property
    def suspected(self) -> bool:
        """Whether the bound that assumes independence contradicts it; look closer, with more canaries."""
        return self.epsilon_pair > self.claimed.epsilon

    def sentence(self) -> str:
        """All of it in one line."""
        verdict = "VIOLATED" if self.violated else "suspected" if self.suspected else "not contradicted"
        return (
            f"epsilon claimed {self.claimed.epsilon:.3g}, contradicted below {self.epsilon:.3g} (one run), "
            f"mu below {self.mu:.3g} (f-DP), {self.epsilon_pair:.3g} and mu {self.mu_pair:.3g} (error rates, if "
            f"independent); delta {self.claimed.delta:g}; {self.right} of {self.guesses} guesses right, "
            f"{self.canaries} canaries: {verdict}"
        )


def bound_from_scores(
    scores: NDArray[np.float64], included: NDArray[np.bool_], claimed: Claimed, *, threshold: float = 0.0,
    significance: float = SIGNIFICANCE,
) -> DpAudit:  # fmt: skip
    """The bounds that the scores of one run give.

    Args:
        scores: [m] the higher, the surer that the canary was in; 0 for undecided where they are log-likelihood ratios.
        included: [m] the coins.
        claimed: the upper bound.
        threshold: for the error rates; fixed before the run.
        significance: of each bound.

    Raises:
        UsageError: too few canaries, or all on one side.
    """
    count = len(scores)
    if count < _LEAST or included.all() or not included.any():
        raise UsageError(
            f"{count} canaries, {int(included.sum())} of them in, give no bound.",
            expected=f"{_LEAST} or more, each in by a fair coin",
        )
    half = count // GUESSED // 2
    order = np.argsort(scores, kind="stable")
    right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    seen = {"canaries": count, "guesses": 2 * half, "right": right}
    told = scores > threshold
    epsilon_pair, mu_pair = pair_bounds(
        int((told & ~included).sum()), int((~included).sum()), int((~told & included).sum()), int(included.sum()),
        delta=claimed.delta, significance=significance,
    )  # fmt: skip
    return DpAudit(
        claimed=claimed,
        **seen,
        epsilon=one_run_epsilon(**seen, delta=claimed.delta, significance=significance),
        mu=one_run_mu(**seen, significance=significance),
        profile_contradicted=contradicts(profile_inverse(claimed.profile), **seen, significance=significance),
        epsilon_pair=epsilon_pair,
        mu_pair=mu_pair,
    )


def steps_score(seen: NDArray[np.float64], *, noise: float, rate: float) -> NDArray[np.float64]:
    """Log-likelihood ratio [m] of "in" against "out" for sampled releases: the best score there is.

    In one step a canary that is in adds 1 with probability `rate`, else nothing, to noise of standard deviation
    `noise`: sum over steps of ln(1 - q + q exp((2 x - 1) / (2 noise^2))).

    Args:
        seen: [S, m] what the canary's coordinate was in each step, in units of the clip.
        noise: noise multiplier, as claimed.
        rate: of sampling.
    """
    power = (2 * seen - 1) / (2 * noise**2)
    with np.errstate(divide="ignore"):
        ratio = np.logaddexp(np.log1p(-rate), np.log(rate) + power)
    return np.asarray(ratio.sum(axis=0), dtype=np.float64)


# ---- the mechanism on activations


class Releasing(Protocol):
    """What is audited: `splitfl.privacy.mechanisms.Gauss`, or something that says it is one."""

    @property
    def clip(self) -> float:
        """Largest norm of a unit."""

    @property
    def sigma(self) -> float:
        """Standard deviation on each coordinate."""

    def protect(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | Coded:
        """What may leave instead of `x`."""


@dataclass(frozen=True, kw_only=True)
class GaussAudit:
    """Empirical lower bounds for one release, at 95 %, beside what is claimed."""

    releases: int
    delta: float
    epsilon_claimed: float
    epsilon: float
    mu_claimed: float
    mu: float

    @property
    def violated(self) -> bool:
        """Whether the claim is contradicted; a sound one is, in at most 5 % of all audits."""
        return self.epsilon > self.epsilon_claimed or self.mu > self.mu_claimed


def audit_gauss(
    mechanism: Releasing, *, releases: int = 400_000, delta: float = 1e-5, shape: tuple[int, int] = (1, 2),
    significance: float = SIGNIFICANCE,
) -> GaussAudit:  # fmt: skip
    """Tell two records apart from their releases, many times; replace-one neighbours.

    Two are as far apart as clipping allows: x and -x, both far longer than the clip. A third is x once more, just as
    long as the clip, which nobody may be able to tell from the longer one. Each release is one draw of the mechanism,
    and what it tells is its product with x. The thresholds are fixed by what is claimed alone: the middle (for mu), and
    some in the tail (for epsilon).

    Args:
        mechanism: what is to be tested; its `clip` and `sigma` are what it claims.
        releases: of the first two records together; half as many of the third come on top.
        delta: of the epsilon.
        shape: positions and width of a record.
        significance: of both bounds together.

    Raises:
        UsageError: too few releases to say anything.
    """
    if releases < 1000:
        raise UsageError(f"{releases} releases say nothing about a tail.", expected="1000 or more")
    half = releases // 2
    record = torch.ones((1, *shape)) / math.sqrt(math.prod(shape)) * mechanism.clip
    away = record / record.norm()

    def told(x: torch.Tensor) -> NDArray[np.float64]:
        parts = (mechanism.protect(x.expand(part, *shape).clone(), None) for part in _parts(half))
        return np.concatenate([(decoded(sent).double() * away).sum((1, 2)).numpy() for sent in parts])

    outside, inside, shorter = told(-_FAR * record), told(_FAR * record), told(record)
    errors = [
        (int((outside > bar).sum()), half, int((inside <= bar).sum()), half)
        for bar in (0.0, *(mechanism.sigma * far - mechanism.clip for far in _TAIL))
    ]
    bar = mechanism.clip + 3 * mechanism.sigma
    errors.append((int((shorter > bar).sum()), half, int((inside <= bar).sum()), half))
    bounds = [pair_bounds(*counts, delta=delta, significance=significance / len(errors)) for counts in errors]
    return GaussAudit(
        releases=2 * half,
        delta=delta,
        epsilon_claimed=zcdp_epsilon(zcdp_rho(2 * mechanism.clip, mechanism.sigma), delta),
        epsilon=max(epsilon for epsilon, _ in bounds),
        mu_claimed=2 * mechanism.clip / mechanism.sigma,
        mu=max(mu for _, mu in bounds),
    )


def _parts(count: int, at_once: int = 65_536) -> Sequence[int]:
    return [min(at_once, count - start) for start in range(0, count, at_once)]
