"""Guarding a classifier's labels: randomised response on the labels, or noise on the gradients that tell them.

Only `randomise_labels` has a claim. `max_norm` and `marvell` are defences against two attacks on gradients (their norm,
their direction) and depend on the labels themselves: whatever they achieve is empirical. All take one row an example.

    Li, Sun, Yang, Gao, Zhang, Xie, Smith and Wang, "Label Leakage and Protection in Two-party Split Learning",
    arXiv 2102.08504: section 4, the heuristic max-norm and the optimised Marvell.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from splitfl.errors import DataError, InternalError, UsageError
from splitfl.privacy.clipping import gaussians

LEAST_EPSILON, LARGEST_EPSILON = 1e-6, 30.0
"""Above the one a label changes once in ten million million times; below the other it says nothing about its row."""
_GRID = 33  # points on each axis of Marvell's search ...
_ZOOMS = 14  # ... which each time goes on in the cells around the best one: an eighth of the width

_Array = npt.NDArray[np.float64]


def randomise_labels(labels: torch.Tensor, classes: int, epsilon: float) -> torch.Tensor:
    """Randomised response (Warner 1965): keep a label with probability e^epsilon / (e^epsilon + K - 1).

    Otherwise it becomes one of the other K - 1 classes, each as likely. Draw once for a data set and train on the
    result: a second draw of the same labels is a second release and adds its epsilon to the first.

    Args:
        labels: integer, any shape, each 0 to `classes` - 1.
        classes: K, 2 or more.
        epsilon: `LEAST_EPSILON` to `LARGEST_EPSILON`.

    Returns:
        New labels of the same shape and dtype.

    Raises:
        UsageError: fewer than two classes, or an epsilon out of range.
        DataError: a label that is no class.

    Hides: each label, by epsilon (delta 0, unit one label, replaced by any other, one draw), from whoever sees anything
        that is computed from the new labels.
    Does not hide: the text, and what the text says about its label; much, where K is small and epsilon above 3.
    """
    if classes < 2:
        raise UsageError(f"Labels of {classes} class cannot be randomised.", expected="2 classes or more")
    if not LEAST_EPSILON <= epsilon <= LARGEST_EPSILON:  # NaN is refused here as well
        raise UsageError(
            f"A label epsilon of {epsilon:g} is no setting.", expected=f"{LEAST_EPSILON:g} to {LARGEST_EPSILON:g}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InternalError(f"Labels of {labels.dtype} were to be randomised.", expected="integers")
    old = labels.detach().cpu().to(torch.int64).numpy().reshape(-1)
    if old.size and not (old.min() >= 0 and old.max() < classes):
        raise DataError(
            "A label is none of the classes.",
            expected=f"0 to {classes - 1}",
            hint="leave rows without a label out before the labels are randomised",
        )
    change = (classes - 1) / (math.exp(epsilon) + classes - 1)
    # Rounded towards more changes: what is drawn keeps a little more than is promised, never less.
    threshold = np.uint64(math.ceil(change * (1 + 2.0**-40) * 2.0**64))
    changed = np.flatnonzero(np.frombuffer(os.urandom(8 * old.size), dtype=np.uint64) < threshold)
    new = old.copy()
    shifts = [1 + secrets.randbelow(classes - 1) for _ in changed]  # exactly uniform, unlike a remainder
    new[changed] = (old[changed] + np.array(shifts, dtype=np.int64)) % classes
    return torch.from_numpy(new).to(labels.device, labels.dtype).view(labels.shape)


def max_norm(gradient: torch.Tensor) -> torch.Tensor:
    """Give all examples' gradients the largest one's norm, by noise at right angles to each.

    Args:
        gradient: floating [B, ...], at least two numbers an example.

    Returns:
        The same shape and dtype.

    Raises:
        UsageError: one number an example: nothing is at right angles to it.

    Hides: the norms, from an attacker who tells labels apart by them. Empirical: no bound.
    Does not hide: the direction, and with it the label from whoever knows one labelled example; which example had the
        largest norm, for it alone goes out as it is.
    """
    rows = _rows(gradient)
    if rows.shape[1] < 2:
        raise UsageError("Max-norm alignment needs gradients of at least two numbers an example.")
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    units = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    noise = gaussians(tuple(rows.shape))
    noise -= (noise * units).sum(1, keepdim=True) * units
    noise /= torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    missing = (norms.max() ** 2 - norms**2).clamp_(min=0).sqrt_()
    return _like(rows + missing * noise, gradient)


@dataclass(frozen=True, kw_only=True)
class MarvellNoise:
    """Variances of the noise that Marvell adds, and what it leaves of the difference; pairs are (label 0, label 1)."""

    along: tuple[float, float]
    """Variance along the difference of the two mean gradients."""
    across: tuple[float, float]
    """Variance of each coordinate at right angles to it."""
    sum_kl: float
    """KL divergences in both directions between the two noisy Gaussians, summed."""

    @property
    def detection_error(self) -> float:
        """No detector of Gaussians with these moments has a mean of false positive and false negative rate below it."""
        return max(0.0, 0.5 - math.sqrt(self.sum_kl) / 4)


def marvell(gradient: torch.Tensor, labels: torch.Tensor, power: float) -> torch.Tensor:
    """Noise that makes the two classes' gradients as alike as its power allows, were they Gaussian.

    A batch of one class alone, or of classes with the same mean, has no difference to hide; it gets `max_norm`.

    Args:
        gradient: floating [B, ...], at least two numbers an example.
        labels: integer [B], 0 or 1.
        power: mean squared norm of the noise, in squared distances between the two classes' mean gradients, above 0.

    Returns:
        The same shape and dtype as `gradient`.

    Raises:
        UsageError: more than two classes (use `max_norm`), or a power not above 0.

    Hides: labels, from detectors that see one batch of gradients, as far as `MarvellNoise.detection_error` says and the
        gradients of a class are Gaussian with equal variances in all directions. Empirical: no bound without that.
    Does not hide: that a batch has both classes; labels from whoever averages over many steps, or the noise's own
        dependence on the labels.
    """
    if not (math.isfinite(power) and power > 0):
        raise UsageError(f"A power of {power:g} is no setting for Marvell.", expected="a finite number above 0")
    rows = _rows(gradient)
    kinds = labels.detach().cpu()
    if kinds.shape != (len(rows),) or kinds.is_floating_point():
        raise InternalError(f"{len(rows)} gradients came with labels of {kinds.dtype}, {tuple(kinds.shape)}.")
    if not bool(((kinds == 0) | (kinds == 1)).all()):
        raise UsageError(
            "Marvell is for two classes, and there is a label that is neither 0 nor 1.",
            expected="labels 0 and 1",
            hint="for more classes use max-norm alignment (max_norm), or randomise the labels (randomise_labels)",
        )
    groups = [rows[kinds == label] for label in (0, 1)]
    if not all(len(group) for group in groups):
        return max_norm(gradient)
    means = [group.mean(0) for group in groups]
    difference = means[1] - means[0]
    gap = float(torch.linalg.vector_norm(difference))
    if gap == 0:
        return max_norm(gradient)
    spread = [float(((group - mean) ** 2).mean()) for group, mean in zip(groups, means, strict=True)]
    noise = solve_marvell(
        spread=(spread[0], spread[1]), gap=gap, share=len(groups[1]) / len(rows), width=rows.shape[1], power=power
    )
    unit = difference / gap
    drawn = gaussians(tuple(rows.shape))
    along = (drawn @ unit)[:, None] * unit
    stds = torch.tensor([noise.across, noise.along], dtype=torch.float64).sqrt()[:, kinds.long(), None]
    return _like(rows + stds[0] * (drawn - along) + stds[1] * along, gradient)


def solve_marvell(*, spread: tuple[float, float], gap: float, share: float, width: int, power: float) -> MarvellNoise:
    """The noise of least `MarvellNoise.sum_kl` for two isotropic Gaussians, under a bound on its mean squared norm.

    Of both classes' noise only the variances along and across the difference of means matter, and of those across only
    the one of the narrower class, up to the wider one's: more would add to the divergence. Along, the whole rest of the
    power is spent, since scaling both variances up always brings the classes closer. That leaves two numbers, the share
    of the power spent across and class 1's share of the rest, found by a grid that zooms in on its best point.

    Args:
        spread: variance of each coordinate of the gradients, (label 0, label 1).
        gap: distance between the two mean gradients, above 0.
        share: fraction of label 1, strictly between 0 and 1.
        width: coordinates of one gradient.
        power: the bound, in units of ``gap ** 2``.
    """
    zero, one = spread
    weights = (1 - share, share)
    budget = power * gap * gap
    narrow = 0 if zero < one else 1
    across_cost = weights[narrow] * (width - 1)  # of one unit of variance in every direction across
    most = 0.0 if across_cost == 0 else min(1.0, abs(one - zero) * across_cost / budget)

    def divergence(spent: _Array, first: _Array) -> _Array:
        lift = spent * budget / across_cost if across_cost else spent * 0
        wide, lifted = max(spread), min(spread) + lift
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where((lifted == wide) | (width == 1), 1.0, lifted / wide)
            rest = (1 - spent) * budget
            a0, a1 = zero + rest * (1 - first) / weights[0], one + rest * first / weights[1]
            along = a0 / a1 + a1 / a0 - 2 + gap * gap * (1 / a0 + 1 / a1)
            total = ((width - 1) * (ratio + 1 / ratio - 2) + along) / 2
        return np.where(np.isnan(total), np.inf, total)

    spent, first, least = _smallest(divergence, most)
    rest = (1 - spent) * budget
    across = [0.0, 0.0]
    across[narrow] = spent * budget / across_cost if across_cost else 0.0
    along = (rest * (1 - first) / weights[0], rest * first / weights[1])
    return MarvellNoise(along=along, across=(across[0], across[1]), sum_kl=least)


def _smallest(divergence: Callable[[_Array, _Array], _Array], most: float) -> tuple[float, float, float]:
    """Where `divergence` is smallest on [0, most] x [0, 1], and its value there."""
    low, high = np.zeros(2), np.array([most, 1.0])
    best = (0.0, 0.0, math.inf)
    for _ in range(_ZOOMS):
        axes = [np.linspace(low[i], high[i], _GRID) for i in range(2)]
        first, second = np.meshgrid(*axes, indexing="ij")
        values = divergence(first, second)
        i, j = np.unravel_index(int(values.argmin()), values.shape)
        if values[i, j] < best[2]:
            best = (float(first[i, j]), float(second[i, j]), float(values[i, j]))
        # Two cells on either side: the best point of the grid may be one cell off the valley's floor.
        reach = 2 * (high - low) / (_GRID - 1)
        centre = np.array(best[:2])
        low, high = np.maximum(centre - reach, 0.0), np.minimum(centre + reach, [most, 1.0])
    return best


def _rows(gradient: torch.Tensor) -> torch.Tensor:
    """float64 [B, d] on the CPU, without the graph."""
    if gradient.dim() < 2 or not gradient.is_floating_point() or not len(gradient):
        raise InternalError(
            f"Gradients of {gradient.dtype} and shape {tuple(gradient.shape)} came.", expected="floating [B, ...]"
        )
    return gradient.detach().to("cpu", torch.float64).flatten(1)


def _like(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return rows.to(gradient.device, gradient.dtype).view(gradient.shape)
