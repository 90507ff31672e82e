"""Smaller weight matrices, for emulators: fewer values, fewer ranks, fewer bits. All of it is undone when it is opened.

These save bytes of an emulator that is handed out, and tell less of the model; they do not make the holder's training
faster, since what is opened is a dense matrix again. Leaving layers out does.

A stored matrix `x` is `x` itself; or `x:codes` and `x:scales`; or the factors `x:left` and `x:right`, each of which may
be stored as codes and scales in turn. No module or parameter of a model has a colon in its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils import prune

from splitfl.errors import ModelError, UsageError, printable

CODES, SCALES, LEFT, RIGHT = ":codes", ":scales", ":left", ":right"
_PAIRS = ((CODES, SCALES), (LEFT, RIGHT))  # in the order in which they are undone
_GROUP = 32  # columns that share a scale at 4 bits

Header: TypeAlias = tuple[tuple[int, ...], str]
"""Shape and dtype (safetensors' name of it) of a stored tensor."""


# ---- one matrix


def prune_smallest(matrices: list[nn.Module], share: float) -> None:
    """Set that share of each module's weight to zero, in place, the smallest magnitudes first.

    Raises:
        UsageError: not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UsageError(f"A share of {share:g} of the weights cannot be pruned.", expected="0 to below 1")
    for module in matrices if share else []:
        prune.l1_unstructured(module, "weight", amount=float(share))
        prune.remove(module, "weight")


def factored(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of `matrix` [m, n] of that rank, as [m, rank] and [rank, n] in its dtype (SVD)."""
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = values[:rank].sqrt()
    factors = left[:, :rank] * root, root[:, None] * right[:rank]
    return factors[0].to(matrix.dtype).contiguous(), factors[1].to(matrix.dtype).contiguous()


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


def check_extra() -> None:
    """Refuse to go on without what `quantised` needs, before hours have been spent.

    Raises:
        UsageError: the extra is missing.
    """
    _torchao()


def _torchao() -> Any:
    try:
        with _quiet_import():
            from torchao.quantization import quant_primitives
    except ImportError as error:
        raise UsageError(
            "Weights are quantised by torchao, which is not installed.", hint="pip install 'splitfl[quantise]'"
        ) from error
    return quant_primitives


@contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao logs which of its compiled kernels do not fit this machine; none of them is used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# ---- all tensors of a file


def compressed(held: Mapping[str, torch.Tensor], *, rank: int | None, bits: int | None) -> dict[str, torch.Tensor]:
    """The tensors as they are stored: matrices in factors where that is fewer values, in codes where bits are given.

    Vectors (biases, norms) and tensors of more than two dimensions (fused experts) stay as they are.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        parts = {name: tensor}
        if _is_matrix(tensor) and rank is not None and rank * sum(tensor.shape) < tensor.numel():
            parts = dict(zip((name + LEFT, name + RIGHT), factored(tensor, rank), strict=True))
        for part, value in parts.items():
            if _is_matrix(value) and bits is not None:
                stored[part + CODES], stored[part + SCALES] = quantised(value, bits)
            else:
                stored[part] = value.contiguous()
    return stored


def _is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.is_floating_point()


def is_compressed(names: Mapping[str, Any]) -> bool:
    """Whether any of these stored names needs `expanded`."""
    return any(":" in name for name in names)


def expanded(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `compressed` was given, as near as what was kept allows. Check `expanded_shapes` first: sizes can explode.

    Returns:
        float32 where something was undone, else the tensor as it is stored.
    """
    plain = dict(stored)
    for first, second in _PAIRS:
        for name in [name for name in plain if name.endswith(first)]:
            base = name.removesuffix(first)
            one, other = plain.pop(name), plain.pop(base + second)
            plain[base] = unquantised(one, other) if first == CODES else one.float() @ other.float()
    return {name: tensor.contiguous() for name, tensor in plain.items()}


def expanded_shapes(headers: Mapping[str, Header]) -> dict[str, tuple[int, ...]]:
    """Shapes of what `expanded` would give, from the headers of a file alone.

    Raises:
        ModelError: parts that do not belong together, which `expanded` could not undo.
    """
    left = dict(headers)
    for first, second in _PAIRS:
        for name in [name for name in left if name.endswith(first)]:
            base = name.removesuffix(first)
            one, other = left.pop(name), left.pop(base + second, None)
            joined = None if other is None or base in left else _JOINED[first](one, other)
            if joined is None:
                raise _torn(base)
            left[base] = joined
    for name in left:
        if ":" in name:
            raise _torn(name)
    return {name: shape for name, (shape, _) in left.items()}


def _dequantised_header(codes: Header, scales: Header) -> Header | None:
    (rows, *columns), dtype = codes if codes[0] else ((0,), "")
    if len(columns) != 1 or dtype not in ("I8", "U8") or scales[1] != "F32":
        return None
    count = columns[0] * (2 if dtype == "U8" else 1)
    fits = len(scales[0]) == 2 and scales[0][0] == rows and scales[0][1] > 0 and count % scales[0][1] == 0
    return ((rows, count), "F32") if fits and count else None


def _multiplied_header(left: Header, right: Header) -> Header | None:
    fits = len(left[0]) == len(right[0]) == 2 and left[0][1] == right[0][0] and 0 not in (*left[0], *right[0])
    floats = {left[1], right[1]} <= {"F32", "F16", "BF16"}
    return ((left[0][0], right[0][1]), "F32") if fits and floats else None


_JOINED = {CODES: _dequantised_header, LEFT: _multiplied_header}


def _torn(name: str) -> ModelError:
    return ModelError(
        f"The parts of the stored matrix {printable(name, 120)} do not fit together.",
        expected="codes with scales, or two factors",
        hint="get the emulator again",
    )
