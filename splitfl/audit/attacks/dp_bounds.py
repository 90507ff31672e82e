"""What counts of right guesses, or of errors, say about differential privacy: lower bounds, each with its confidence.

The null hypothesis is always the claim. A bound says: were the mechanism as private as that, counts like these would
come with a probability below `significance`. Legend: m canaries, r guesses, v of them right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Inverse: TypeAlias = Callable[[float], float]
"""Inverse of 1 - f for a trade-off function f: the least false-positive rate at which a test may be right so often."""
_NORMAL = NormalDist()
_LARGEST = 60.0  # an epsilon or mu beyond which nothing is looked for


# ---- binomial


def binomial_tail(trials: int, share: float) -> Floats:
    """P[W >= v] for v = 0 to `trials` + 1, float64 [trials + 2], where W counts successes of chance `share`."""
    mass = _masses(trials, share, trials)
    return np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]]).clip(max=1.0)


def clopper_pearson_upper(errors: int, trials: int, significance: float) -> float:
    """The largest chance of an error that `errors` of `trials` leave possible (Clopper and Pearson 1934, one-sided)."""
    if errors >= trials:
        return 1.0
    low, high = errors / trials, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _masses(trials, middle, errors).sum() > significance:
            low = middle
        else:
            high = middle
    return high


def _masses(trials: int, share: float, most: int) -> Floats:
    """P[W = v] for v = 0 to `most`."""
    if share <= 0 or share >= 1:
        return np.asarray(np.arange(most + 1) == (0 if share <= 0 else trials), dtype=np.float64)
    return np.exp(_ways(trials)[: most + 1] + np.arange(most + 1) * math.log(share / (1 - share))
                  + trials * math.log1p(-share))  # fmt: skip


@lru_cache(maxsize=8)
def _ways(trials: int) -> Floats:
    """Logarithm of the number of ways to choose v of `trials`, v = 0 to `trials`."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    return np.asarray(factorials[-1] - factorials - factorials[::-1], dtype=np.float64)


# ---- one run, (epsilon, delta)


def one_run_chance(epsilon: float, delta: float, *, canaries: int, guesses: int, right: int) -> float:
    """How likely an (epsilon, delta) private run is to give `right` of `guesses`, at most.

    Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023, theorem 5.2: with W binomial of r
    trials of chance e^epsilon / (1 + e^epsilon),

        P[W >= v] + 2 m delta max over i = 1 to v of (P[W >= v - i] - P[W >= v]) / i
    """
    tail = binomial_tail(guesses, 1 / (1 + math.exp(-epsilon)))
    chance = float(tail[right])
    if delta and right:
        steps = np.arange(1, right + 1)
        chance += 2 * canaries * delta * float(((tail[right - steps] - chance) / steps).max())
    return min(chance, 1.0)


def one_run_epsilon(*, canaries: int, guesses: int, right: int, delta: float, significance: float) -> float:
    """The largest epsilon that `right` of `guesses` contradict at `delta`; 0 where they contradict none."""
    return _largest(
        lambda epsilon: one_run_chance(epsilon, delta, canaries=canaries, guesses=guesses, right=right) < significance
    )


# ---- one run, f-DP


def gaussian_inverse(mu: float) -> Inverse:
    """That of the Gaussian mechanism of `mu` (Dong, Roth and Su, "Gaussian Differential Privacy", 2022)."""
    return lambda y: 0.0 if y <= 0 else 1.0 if y >= 1 else _NORMAL.cdf(_NORMAL.inv_cdf(y) - mu)


def profile_inverse(profile: Sequence[tuple[float, float]]) -> Inverse:
    """That of everything that is (epsilon, delta) private for all pairs of `profile` at once (same paper, prop. 2.12).

    Few pairs give a weaker claim than the mechanism's own, never a stronger one.
    """
    pairs = np.array(profile, dtype=np.float64)
    grown, delta = np.exp(pairs[:, 0]), pairs[:, 1]

    def inverse(y: float) -> float:
        least = np.maximum((y - delta) / grown, 1 - delta - grown * (1 - y))
        return min(1.0, max(0.0, float(least.max())))

    return inverse


def contradicts(inverse: Inverse, *, canaries: int, guesses: int, right: int, significance: float) -> bool:
    """Whether `right` of `guesses` contradict f-DP.

    The recursion of Mahloujifar, Melis and Chaudhuri, "Auditing f-Differential Privacy in One Run", 2024 (arXiv
    2410.22235, section 4, two alternatives a canary). It goes down from v right guesses and bounds, for every number
    i, how many canaries in how many runs can be guessed with i of them right; at 0 the shares must make up r / m.
    """
    hit, miss = significance * right / canaries, significance * (guesses - right) / canaries
    for at in range(right - 1, -1, -1):
        more = max(miss, inverse(hit))
        if more == miss:  # nothing changes any more
            break
        hit = min(1.0, hit + at / (guesses - at) * (more - miss))
        miss = more
    return hit + miss > guesses / canaries


def one_run_mu(*, canaries: int, guesses: int, right: int, significance: float) -> float:
    """The largest mu of Gaussian differential privacy that `right` of `guesses` contradict; 0 where none."""
    return _largest(
        lambda mu: contradicts(
            gaussian_inverse(mu), canaries=canaries, guesses=guesses, right=right, significance=significance
        )
    )


# ---- independent trials


def pair_bounds(
    false_positives: int, negatives: int, false_negatives: int, positives: int, *, delta: float, significance: float
) -> tuple[float, float]:
    """Largest epsilon (at `delta`) and mu that error rates over independent trials contradict; 0 where none.

        epsilon >= ln((1 - delta - FNR) / FPR), and the same with both exchanged     Kairouz, Oh and Viswanath, 2015
        mu      >= Phi^-1(1 - FPR) - Phi^-1(FNR)                                     Dong, Roth and Su, 2022

    with the Clopper-Pearson upper ends of both rates, each at half of `significance`. The threshold that made them
    errors must have been fixed before the trials.
    """
    fpr = clopper_pearson_upper(false_positives, negatives, significance / 2)
    fnr = clopper_pearson_upper(false_negatives, positives, significance / 2)
    epsilon = 0.0
    for one, other in ((fpr, fnr), (fnr, fpr)):
        if 1 - delta - other > one:
            epsilon = max(epsilon, math.log((1 - delta - other) / one))
    if not (0 < fpr < 1 and 0 < fnr < 1):
        return epsilon, 0.0
    return epsilon, max(0.0, _NORMAL.inv_cdf(1 - fpr) - _NORMAL.inv_cdf(fnr))


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest value from 0 that is refuted, to 1e-4; what is refuted comes first."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if high > _LARGEST:
            return low
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
