"""Sums of low-rank changes, their norms and their best approximations, from the factors alone.

    R  ranks together    k  what is left of them    d_in, d_out  widths of the module

A product [d_out, d_in] is never formed: 4096 x 4096 in float64 is 134 MB a module, and its decomposition a thousand
times dearer than that of the small matrix between two QR decompositions. All arithmetic is float64; factors are rounded
once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from splitfl.aggregation.factors import Pair

_GONE = 1e-12  # of the largest singular value: below, a direction carries nothing
_FRESH_NORM = 1 / math.sqrt(3)  # of a row of A as LoRA draws it: uniform within 1/sqrt(d_in)


def stacked(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """One pair whose change is the sum of ``weight * change``; its rank is the sum of the ranks.

    The weight goes on B, once. With one scale for all it stays as it is; else it is multiplied into B and becomes 1.
    """
    weights = [1.0] * len(pairs) if weights is None else weights
    pairs = [pair.without_core() for pair in pairs]
    scale = pairs[0].scale if len({pair.scale for pair in pairs}) == 1 else 1.0
    b = [(pair.at_scale(scale).b.double() * weight).float() for pair, weight in zip(pairs, weights, strict=True)]
    return Pair(torch.cat([pair.a for pair in pairs]), torch.cat(b, dim=1), scale)


def squeezed(pair: Pair) -> Pair:
    """The same change with a rank of at most min(d_in, d_out), by one QR decomposition."""
    d_in, d_out = pair.widths
    if pair.rank <= min(d_in, d_out):
        return pair
    b, a = pair.b.double(), pair.a.double()
    if d_out <= d_in:  # B = (Q R)^T with Q [R, d_out]
        q, r = torch.linalg.qr(b.T)
        return replace(pair, b=r.T.float().contiguous(), a=(q.T @ a).float())
    q, r = torch.linalg.qr(a)
    return replace(pair, b=(b @ q).float(), a=r.float())


def norm(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> float:
    """Frobenius norm of the sum of ``weight * change``.

    By QR and not by traces of Gram matrices, which would lose half of the digits where changes cancel.
    """
    b, a = _wide(pairs, weights)
    return float(torch.linalg.matrix_norm(_triangle(b) @ _triangle(a.T).T))


def best(pairs: Sequence[Pair], weights: Sequence[float], rank: int, scale: float) -> Pair:
    """The best approximation of the sum of ``weight * change`` of `rank`, or of less if all ranks together are less.

    QR of the stacked factors, singular values of the small [k, k] matrix between them (Eckart-Young); both factors get
    the root of each value, strongest first. A direction that carries nothing keeps a row in A, as long as a fresh one,
    and a zero in B: with zeros in both it could never be trained again.
    """
    b, a = _wide(pairs, weights)
    householder_b, householder_a = torch.geqrf(b), torch.geqrf(a.T.contiguous())
    u, s, vh = torch.linalg.svd(_upper(householder_b[0]) @ _upper(householder_a[0]).T, full_matrices=False)
    kept = min(rank, s.numel())
    u, s, v = u[:, :kept], s[:kept], vh[:kept].T
    alive = s > _GONE * s.max().clamp_min(torch.finfo(torch.float64).tiny)
    root = torch.sqrt(s / scale)
    new_b = _rotated(householder_b, u) * torch.where(alive, root, torch.zeros_like(root))
    new_a = _rotated(householder_a, v) * torch.where(alive, root, torch.full_like(root, _FRESH_NORM))
    return Pair(new_a.T.float().contiguous(), new_b.float(), scale)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis, float64 [d, k], whose first columns span those of `columns` [d, k] with k <= d.

    Where they already are orthonormal they come back as they are, signs included.
    """
    q, r = torch.linalg.qr(columns.double())
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _wide(pairs: Sequence[Pair], weights: Sequence[float] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacked factors, float64 [d_out, R] and [R, d_in]."""
    weights = [1.0] * len(pairs) if weights is None else weights
    factors = [pair.wide() for pair in pairs]
    b = torch.cat([b * weight for (b, _), weight in zip(factors, weights, strict=True)], dim=1)
    return b, torch.cat([a for _, a in factors])


def _triangle(tall: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(tall, mode="r").R


def _upper(reflected: torch.Tensor) -> torch.Tensor:
    return torch.triu(reflected[: min(reflected.shape)])


def _rotated(householder: tuple[torch.Tensor, torch.Tensor], small: torch.Tensor) -> torch.Tensor:
    """Q times `small` [k, c], without forming Q."""
    reflected, tau = householder
    padded = reflected.new_zeros(reflected.shape[0], small.shape[1])
    padded[: small.shape[0]] = small
    return torch.ormqr(reflected[:, : tau.numel()].contiguous(), tau, padded)
