"""What the mechanisms share: real positions, clipping onto the grid that goes on the wire, and uniforms without a seed.

The grid is the integers times a power of two, so that a code times its step is exact in float32 and the noise is added
to integers only (why: Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012).
Clipping is in float64 and rounds towards zero: no coordinate moves outwards, so the bound on the norm survives.

Randomness is `os.urandom`: no seed to guess, nothing shared with a forked process.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from splitfl.errors import InternalError, ModelError, UsageError

Unit = Literal["record", "token"]

NOISE_REACH = 10.0
"""Standard deviations of noise that the grid leaves room for beside the clip norm: one value in 1e23 saturates."""
LARGEST_CODE = 32_767
_COARSEST = 4.0  # grid steps in one sigma, at least: below, the grid and not the noise is what the receiver sees
_STEPS = (2.0**-60, 2.0**60)  # what a frame's header may say
# A norm summed in float64 over n squares is wrong by at most n * 2^-54 of itself, in whatever order. Clipping to this
# share of the bound keeps the exact norm below the bound for every tensor of fewer than 2^33 numbers.
_JUST_BELOW = 1 - 2.0**-20


def real_only(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`x` without its graph and with zeros at padded positions.

    Args:
        x: floating [B, T, D].
        mask: integer or bool [B, S], S >= T, 1 where there is a token; with a cache the last T columns are the new
            positions. None if nothing is padded.

    Returns:
        Floating [B, T, D]; a new tensor only where something is padded.

    Raises:
        InternalError: the shapes do not fit.
        ModelError: a real position holds NaN or infinity.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise InternalError(
            f"A mechanism was given {x.dtype} of shape {tuple(x.shape)}.", expected="floating [B, T, D]"
        )
    clean = x.detach()
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
            raise InternalError(
                f"A mask of shape {tuple(mask.shape)} came with {tuple(x.shape)}.", expected="[B, T] or longer rows"
            )
        padded = mask[:, mask.shape[1] - x.shape[1] :].to(x.device) == 0
        clean = clean.masked_fill(padded[..., None], 0)
    if not bool(torch.isfinite(clean.sum(dtype=torch.float64))) and not bool(torch.isfinite(clean).all()):
        raise ModelError(
            "What the model computed at the cut holds NaN or infinity; nothing was sent.",
            expected="finite numbers",
            hint="lower the learning rate, or compute in float32 or bfloat16 instead of float16",
        )
    return clean


@lru_cache(maxsize=256)
def grid_step(clip: float, sigma: float) -> float:
    """The finest power of two that leaves 16 bits room for the clip norm and `NOISE_REACH` sigmas.

    The finest and not merely one below sigma: a record's norm is spread over T x D coordinates, each far below sigma,
    and rounding towards zero on a coarse grid would take away what the noise would have left.

    Args:
        clip: largest L2 norm of one unit, above 0.
        sigma: standard deviation of the noise on each coordinate, in the same scale, above 0.

    Raises:
        UsageError: not positive, beyond what a frame can say, or the noise too small for a 16-bit grid of that reach.
    """
    for name, value in (("clip", clip), ("sigma", sigma)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(
                f"{name} = {value:g} is no setting for noise.",
                expected="a finite number above 0, in the scale of the activations or gradients",
                hint="noise needs both a clip norm and a sigma; for no noise leave the mechanism out",
            )
    step = _power_of_two_above((clip + NOISE_REACH * sigma) / LARGEST_CODE)
    if sigma / step < _COARSEST:
        finest = _power_of_two_above(clip / (LARGEST_CODE - NOISE_REACH * _COARSEST))
        raise UsageError(
            f"sigma = {sigma:g} is too small beside clip = {clip:g} for a grid of 16 bits.",
            expected=f"sigma of at least {_COARSEST:g} grid steps, the clip norm and the noise within {LARGEST_CODE}",
            hint=f"the nearest sigma for this clip norm is {_COARSEST * finest!r}; so little noise hides nothing",
        )
    if not _STEPS[0] <= step <= _STEPS[1]:
        raise UsageError(
            f"clip = {clip:g} and sigma = {sigma:g} need a grid step of {step:g}.",
            expected="a step of 2^-60 to 2^60",
            hint="give both in the scale of the activations or gradients",
        )
    return step


def _power_of_two_above(value: float) -> float:
    """The smallest power of two that is not below `value` > 0; exact, unlike a logarithm."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def clip_to_grid(x: torch.Tensor, *, clip: float, step: float, unit: Unit) -> torch.Tensor:
    """Scale down what is longer than `clip`, then round towards zero.

    Args:
        x: floating and finite [B, T, D].
        clip: largest L2 norm of a record's [T, D] (``"record"``) or of each [D] row (``"token"``).
        step: a power of two.
        unit: what the bound holds for.

    Returns:
        int32 [B, T, D]; the exact norm of each unit's codes times `step` is at most `clip`.
    """
    wide = x.to(torch.float64)
    norms = torch.linalg.vector_norm(wide, dim=(1, 2) if unit == "record" else 2, keepdim=True)
    # A norm of zero gives infinity, and so the factor 1; one that overflowed gives 0.
    factors = (clip * _JUST_BELOW / norms).clamp_(max=1.0)
    return (wide * (factors / step)).to(torch.int32)  # the conversion rounds towards zero


def uniforms(count: int) -> npt.NDArray[np.float64]:
    """`count` independent uniforms on the 2^53 equal steps of (0, 1], from the operating system's random source."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (words + np.uint64(1)).astype(np.float64) * 2.0**-53


def gaussians(shape: tuple[int, ...]) -> torch.Tensor:
    """Independent standard normals, float64 of `shape`, by Box and Muller (1958) from `uniforms`.

    For directions and for noise without a formal claim: a continuous density in floating point is what Mironov's attack
    reads. Noise that carries a claim is `splitfl.privacy.discrete`'s.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log(uniforms(half)))
    angle = 2 * math.pi * uniforms(half)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(both.reshape(shape))
