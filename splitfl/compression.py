"""Smaller weight matrices, for emulators: fewer values, fewer ranks, fewer bits. All of it is undone when it is opened.

These save bytes of an emulator that is handed out, and tell less of the model; they do not make the holder's training
faster, since what is opened is a dense matrix again. Leaving layers out does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from splitfl.errors import UsageError

_GROUP = 32  # columns that share a scale at 4 bits


def prune_smallest(matrices: list[nn.Module], share: float) -> None:
    """Set that share of each module's weight to zero, in place, the smallest magnitudes first.

    Raises:
        UsageError: not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UsageError(f"A share of {share:g} of the weights cannot be pruned.", expected="0 to below 1")
    for module in matrices if share else []:
        prune.l1_unstructured(module, "weight", amount=share)
        prune.remove(module, "weight")


def factored(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of `matrix` [m, n] of that rank, as [m, rank] and [rank, n] in its dtype (SVD)."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(matrix.dtype).contiguous(), (root[:, None] * right[:rank]).to(
        matrix.dtype
    ).contiguous()


def quantised(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`matrix` [m, n] as codes and float32 scales, symmetric, by torchao.

    Returns:
        At 8 bits int8 [m, n] and one scale a row [m, 1]. At 4 bits uint8 [m, n / 2], the even column in the low nibble
        as code + 8, and one scale for 32 columns [m, n / 32]; where 32 does not divide n, one scale a row; where n is
        odd, 8 bits.

    Raises:
        UsageError: neither 8 nor 4 bits, or the extra is missing.
    """
    if bits not in (8, 4):
        raise UsageError(f"Weights cannot be stored in {bits} bits.", expected="8 or 4")
    rows, columns = matrix.shape
    four = bits == 4 and columns % 2 == 0
    group = _GROUP if four and columns % _GROUP == 0 else columns
    low, high = (-8, 7) if four else (-128, 127)
    tools = _torchao()
    block = (1, group)
    scales, zeros = tools.choose_qparams_affine(
        matrix.float(), tools.MappingType.SYMMETRIC, block, torch.int8, quant_min=low, quant_max=high
    )
    codes = tools.quantize_affine(matrix.float(), block, scales, zeros, torch.int8, quant_min=low, quant_max=high)
    scales = scales.float().reshape(rows, columns // group).contiguous()
    if not four:
        return codes.contiguous(), scales
    nibbles = (codes + 8).to(torch.uint8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous(), scales


def unquantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrix that codes and scales stand for, float32 [m, n]; needs no extra."""
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).to(torch.int16) - 8
    rows, groups = scales.shape
    return (codes.float().reshape(rows, groups, -1) * scales[..., None]).reshape(rows, -1)


def _torchao() -> Any:
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise UsageError(
            "Weights are quantised by torchao, which is not installed.", hint="pip install 'splitfl[quantise]'"
        ) from error
    return quant_primitives
