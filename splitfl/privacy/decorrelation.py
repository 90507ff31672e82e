"""Distance correlation as a training loss: GuardedTuning's distance decorrelation, NoPeek's leakage term.

    dCor^2 = <A, B> / sqrt(<A, A> <B, B>),   <A, B> = sum_{i != j} A_ij B_ij / (n (n - 3))

A and B are the U-centred distance matrices of the two samples:

    A_ij = a_ij - sum_l a_il / (n - 2) - sum_k a_kj / (n - 2) + sum_kl a_kl / ((n - 1) (n - 2)),   A_ii = 0

(Szekely and Rizzo, "Partial distance correlation with methods for dissimilarities", Annals of Statistics 2014,
definitions 2 and 3 and equation 3.4: the bias-corrected statistic.) The usual double-centred statistic is 0.98 for
independent data at n = 8 and 0.45 at n = 1024 (d = 64), so in small batches its gradient says nothing; this one is zero
on average whatever n, and below zero about half the time when the samples are independent.

The sample is tokens, not rows: use `flatten_tokens` on both sides with the same mask. As a loss:
``task_loss + alpha * distance_correlation(flatten_tokens(embeddings, mask), flatten_tokens(hidden, mask))``.
"""

from __future__ import annotations

import torch

from splitfl.errors import InternalError, UsageError

FEWEST = 4
"""Points below which the estimator is not defined."""
# Mean squared U-centred distance, as a share of the squared mean distance, that counts as none: float32 rounding of the
# distances leaves about 1e-14. Equal points and equidistant ones both have none.
_NO_VARIANCE = 1e-12


def flatten_tokens(x: torch.Tensor, mask: torch.Tensor | None, limit: int = 512) -> torch.Tensor:
    """The real positions of a batch as points, at most `limit` of them.

    Which ones depends on the mask and the shape alone, so that two tensors of one batch give matching points: evenly
    spaced over the batch's real positions.

    Args:
        x: floating [B, T, D]; the graph is kept.
        mask: integer or bool [B, T], 1 where there is a token; None if nothing is padded.
        limit: most points; memory and time of `distance_correlation` grow with its square.

    Returns:
        [n, D], n <= limit.

    Raises:
        InternalError: the shapes do not fit.
        UsageError: `limit` below `FEWEST`.
    """
    if x.dim() != 3 or (mask is not None and mask.shape != x.shape[:2]):
        came = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
        raise InternalError(f"Tokens of shape {tuple(x.shape)} came with {came}.", expected="[B, T, D] and [B, T]")
    if limit < FEWEST:
        raise UsageError(f"A limit of {limit} tokens leaves no estimate.", expected=f"{FEWEST} or more")
    points = x.flatten(0, 1)
    if mask is not None:
        points = points[mask.flatten().to(x.device) != 0]
    count = points.shape[0]
    if count <= limit:
        return points
    # Integer arithmetic: distinct as long as count >= limit, and the same on every device.
    return points[torch.arange(limit, device=x.device) * count // limit]


def distance_correlation(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of the squared distance correlation of two matched samples; differentiable in both.

    Args:
        x: floating [n, p].
        z: floating [n, q]; row i belongs to row i of `x`.

    Returns:
        Scalar of the wider of both dtypes, float32 at least. 1 for samples that differ by shift, rotation and scale;
        about 0, on either side of it, for independent ones. 0, with a gradient of zeros, where a sample's distances do
        not vary. Memory: a few n x n matrices.

    Raises:
        InternalError: not two matrices of equally many rows.
        UsageError: fewer than `FEWEST` rows.

    Hides: nothing that is proven. It bends training away from activations whose distances follow the text's.
    Does not hide: the text from an attacker who learns to invert the new activations. It is a number about the batch it
    was measured on, and bounds no adversary; feature-space hijacking was shown to survive it.
    """
    if x.dim() != 2 or z.dim() != 2 or x.shape[0] != z.shape[0]:
        raise InternalError(
            f"Distance correlation of {tuple(x.shape)} with {tuple(z.shape)} is not defined.",
            expected="[n, p] and [n, q]; flatten_tokens makes them from [B, T, D]",
        )
    if x.shape[0] < FEWEST:
        raise UsageError(
            f"Distance correlation of {x.shape[0]} tokens has no unbiased estimate.",
            expected=f"{FEWEST} or more, 256 for a useful one",
            hint="raise the batch size, or leave the decorrelation out",
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
    a, b = _u_centred(x.to(dtype)), _u_centred(z.to(dtype))
    squares = (a * a).mean(), (b * b).mean()
    varies = (squares[0] > _NO_VARIANCE) & (squares[1] > _NO_VARIANCE)
    # Both branches of `where` are differentiated: the unused one must have a finite gradient as well.
    scale = torch.where(varies, squares[0] * squares[1], torch.ones_like(squares[0])).sqrt()
    ratio = (a * b).mean() / scale
    return torch.where(varies, ratio, torch.zeros_like(ratio)).to(dtype)


def _u_centred(points: torch.Tensor) -> torch.Tensor:
    """U-centred distances [n, n], float64, in units of the mean distance (which the correlation does not depend on)."""
    n = points.shape[0]
    # Without the matrix product: it cancels, and gives equal points a distance and a huge gradient.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").to(torch.float64)
    mean = distances.detach().mean()
    distances = distances / torch.where(mean > 0, mean, torch.ones_like(mean))
    rows = distances.sum(1)
    centred = distances - (rows[:, None] + rows[None, :]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.masked_fill(torch.eye(n, dtype=torch.bool, device=points.device), 0.0)
