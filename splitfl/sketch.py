"""What a server's rows are about, in a few dozen noisy numbers: enough to find similar peers, bounded for each row.

Each row gives one vector: features of a public encoder, less a public centre, projected onto a few directions that an
agreed seed draws, brought to norm 1 and cut towards zero onto a grid of `GRID` steps. The sketch is the sum of these
over all rows, plus discrete Gaussian noise on every coordinate. With labels, each class has coordinates of its own.

Sensitivity (L2, in grid steps): a row that is added or taken away moves the sum by `grid` at most, a row that is
replaced by 2 x `grid`. The number of rows is told as it is, so the bound that is claimed is the one for *replace one*,
as everywhere in this project; rho of zCDP is (2 grid)^2 / (2 sigma^2) (Canonne, Kamath and Steinke 2020, theorem 14).

Everything done with sketches once they are made (`similarities`) is post-processing, also with one's own: the noisy
one is used there too, so that the choice of neighbours tells nothing more.

Does not hide: the number of rows, and what the rows have in common. That is what it is for.

Legend: N rows, F features of the encoder, K numbers of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from splitfl.errors import UsageError
from splitfl.privacy.calibration import Claim, zcdp_epsilon, zcdp_rho, zcdp_sigma
from splitfl.privacy.discrete import LARGEST_SIGMA, sampler

DIRECTIONS = 32
"""Directions that features are projected onto: enough to tell topics apart, few enough for the noise."""
GRID = 128
"""Grid steps of a vector of norm 1, unless the noise would be too wide to be drawn."""
MOST_ROWS = 1 << 23
"""Rows of one sketch: their sum stays far inside 32 bits."""

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SketchPlan:
    """How a sketch is noised, and what that promises."""

    grid: int
    sigma: float
    """Of the noise on each coordinate, in grid steps."""
    delta: float

    @property
    def sensitivity(self) -> float:
        """L2, replace one row, in grid steps."""
        return 2.0 * self.grid

    @property
    def rho(self) -> float:
        """zCDP of the one release."""
        return zcdp_rho(self.sensitivity, self.sigma)

    def claim(self) -> Claim:
        """The bound, with all that belongs to it."""
        epsilon = zcdp_epsilon(self.rho, self.delta)
        return Claim(
            mechanism="discrete Gaussian noise",
            channel="the similarity sketch",
            unit="record",
            adversary="all peers together, and whoever they pass it on to",
            sensitivity=self.sensitivity,
            sigma=self.sigma,
            delta=self.delta,
            releases_planned=1,
            epsilon_one=epsilon,
            epsilon_all=epsilon,
            formal=True,
        )


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A released sketch, one's own or a peer's."""

    values: npt.NDArray[np.int32]
    """[K], in grid steps."""
    rows: int
    grid: int


def plan_sketch(epsilon: float, delta: float) -> SketchPlan:
    """The noise with which one sketch may be released within epsilon at delta, for replacing one row.

    Raises:
        UsageError: a value out of range, an epsilon too small to draw noise for, `dp-accounting` is missing.
    """
    per_step = zcdp_sigma(epsilon, delta, sensitivity=2.0)
    grid = GRID
    while grid > 1 and per_step * grid > LARGEST_SIGMA:
        grid //= 2
    if per_step * grid > LARGEST_SIGMA:
        raise UsageError(
            f"An epsilon of {epsilon:g} for the sketch takes more noise than can be drawn.",
            expected="an epsilon of about 0.005 or more",
            hint="leave the sketch out with --no-sketch",
        )
    return SketchPlan(grid=grid, sigma=per_step * grid, delta=delta)


def directions(features: int, seed: int) -> Floats:
    """The agreed directions, float64 [F, DIRECTIONS]; every server draws the same from the same seed."""
    drawn: Floats = np.random.Generator(np.random.PCG64([seed, features])).standard_normal((features, DIRECTIONS))
    return drawn


def row_codes(
    features: Floats, centre: Floats, seed: int, grid: int, *, labels: Sequence[int] | None = None, classes: int = 1
) -> Codes:
    """What each row adds to the sketch.

    Args:
        features: [N, F]; a row that is not finite adds nothing.
        centre: [F], public, the same at every server.
        seed: of the directions.
        grid: steps of a vector of norm 1.
        labels: class number of each row; None leaves labels out.
        classes: how many there are.

    Returns:
        int64 [N, K], the L2 norm of each row at most `grid`, exactly.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        projected = (features.astype(np.float64) - centre) @ directions(features.shape[1], seed)
        norms = np.linalg.norm(projected, axis=1, keepdims=True)
        sound = np.isfinite(norms) & (norms > 0)
        unit = np.where(sound, projected / np.where(sound, norms, 1.0), 0.0)
    codes = np.trunc(unit * grid).astype(np.int64)
    over = np.flatnonzero((codes**2).sum(axis=1) > grid * grid)  # by a rounding error at most
    for row in over:
        place = np.abs(codes[row]).argmax()
        codes[row, place] -= np.sign(codes[row, place])
    if labels is None:
        return codes
    spread = np.zeros((len(codes), classes, DIRECTIONS), dtype=np.int64)
    spread[np.arange(len(codes)), np.asarray(labels, dtype=np.intp)] = codes
    return spread.reshape(len(codes), classes * DIRECTIONS)


def release(codes: Codes, plan: SketchPlan) -> Sketch:
    """The noisy sum. The noise is new at every call: call it once, and keep what it returns.

    Raises:
        UsageError: no rows, or more than `MOST_ROWS`.
    """
    if not 1 <= len(codes) <= MOST_ROWS:
        raise UsageError(f"A sketch of {len(codes)} rows cannot be made.", expected=f"1 to {MOST_ROWS} rows")
    noise = sampler(plan.sigma).draw(codes.shape[1]).astype(np.int64)
    limits = np.iinfo(np.int32)
    values = np.clip(codes.sum(axis=0) + noise, limits.min, limits.max).astype(np.int32)
    return Sketch(values=values, rows=len(codes), grid=plan.grid)


def similarities(own: Sketch, others: Mapping[str, Sketch]) -> dict[str, float]:
    """How alike each of `others` is to one's own rows: cosines of the mean vectors, -1 to 1.

    With two or more others, what all servers have in common is taken out first, so that 0 is about the average. Noise
    draws every figure towards 0.
    """
    if not others:
        return {}
    names = list(others)
    means = np.stack([each.values / (each.rows * each.grid) for each in (own, *others.values())])
    if len(names) > 1:
        means = means - means.mean(axis=0)
    norms = np.linalg.norm(means, axis=1)
    sizes = np.maximum(norms[1:] * norms[0], np.finfo(np.float64).tiny)
    cosines = np.clip((means[1:] @ means[0]) / sizes, -1.0, 1.0)
    return dict(zip(names, cosines.tolist(), strict=True))
