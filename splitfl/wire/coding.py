"""Step 5 of the journey, for a tensor that a mechanism has turned into codes: grid integers, int8, int4 or top-k.

A coded tensor is one frame like any other. Its bytes follow from coding and shape alone, so both sides check its length
before they touch it; what a code means stands in the header (`TensorSpec.coding`, `step`, `kept`). B rows, T positions,
D width; all numbers little-endian.

    coding   frame                                                   value of one number
    grid16   [B, T, D] int16                                         code * step, step a power of two
    int8     [B, T] float32 scales, then [B, T, D] int8              code * scale of its token
    int4     [B, T] float32 scales, then [B, T, ceil(D/2)] uint8     (nibble - 8) * scale; even column in the low nibble
    topk     [B, T, kept] uint16 columns, then [B, T, kept] float16  the kept ones; 0 elsewhere

`grid16` carries what noise was added to, exactly: no rounding happens after the noise. The other three save bytes and
promise nothing about what can be read from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from splitfl.errors import InternalError, WireError
from splitfl.wire.messages import CodingName

__all__ = ["CODINGS", "Coded", "coded_bytes", "decode", "encode_grid16", "encode_int4", "encode_int8", "encode_topk"]

CODINGS: frozenset[str] = frozenset(get_args(CodingName)) - {"raw"}
WIDEST = 65_536  # columns that a 16-bit index can name

_Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A tensor as it crosses: what a mechanism hands to the wire, and what a retry sends again."""

    coding: CodingName
    shape: tuple[int, ...]
    """[B, T, D] of the numbers it stands for."""
    payload: torch.Tensor
    """uint8, flat: the very bytes of the frame."""
    step: float = 0.0
    """Grid step of ``grid16``; 0 for the others."""
    kept: int = 0
    """Numbers kept of each token by ``topk``; 0 for the others."""

    def decode(self) -> torch.Tensor:
        """float32 [B, T, D]: what the receiver computes with."""
        return decode(self.payload.numpy(), coding=self.coding, shape=self.shape, step=self.step, kept=self.kept)


# ---- out


def encode_grid16(codes: torch.Tensor, step: float) -> Coded:
    """Grid points as ``grid16``.

    Args:
        codes: integer [B, T, D]; beyond 16 bits they saturate, which only the receiver's precision notices.
        step: what one unit is worth; a power of two, so that ``code * step`` is exact in float32.

    Raises:
        InternalError: `step` is no power of two.
    """
    if not step > 0 or math.frexp(step)[0] != 0.5:
        raise InternalError(f"A grid step of {step!r} is no power of two.")
    narrow = codes.clamp(-32768, 32767).to(device="cpu", dtype=torch.int16).contiguous()
    return Coded(coding="grid16", shape=tuple(codes.shape), payload=_bytes_of(narrow.numpy(), "<i2"), step=float(step))


def encode_int8(x: torch.Tensor) -> Coded:
    """`x` float [B, T, D] as ``int8``: per token, the largest magnitude becomes 127."""
    scales, codes = _scaled(x, 127)
    payload = torch.cat([_bytes_of(scales.numpy(), "<f4"), _bytes_of(codes.to(torch.int8).numpy(), "i1")])
    return Coded(coding="int8", shape=tuple(x.shape), payload=payload)


def encode_int4(x: torch.Tensor) -> Coded:
    """`x` float [B, T, D] as ``int4``: per token, the largest magnitude becomes 7."""
    scales, codes = _scaled(x, 7)
    nibbles = (codes + 8).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    payload = torch.cat([_bytes_of(scales.numpy(), "<f4"), packed.reshape(-1)])
    return Coded(coding="int4", shape=tuple(x.shape), payload=payload)


def encode_topk(x: torch.Tensor, kept: int) -> Coded:
    """`x` float [B, T, D] as ``topk``: of each token, the `kept` numbers of largest magnitude."""
    whole = x.detach().to("cpu", torch.float32)
    columns = whole.abs().topk(kept, dim=-1, sorted=False).indices
    values = whole.gather(-1, columns).clamp(-65504, 65504).to(torch.float16)
    payload = torch.cat([_bytes_of(columns.numpy().astype("<u2"), "<u2"), _bytes_of(values.numpy(), "<f2")])
    return Coded(coding="topk", shape=tuple(x.shape), payload=payload, kept=kept)


def _scaled(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 scales [B, T], and `x` over its token's scale, rounded to integers in [-largest, largest]."""
    whole = x.detach().to("cpu", torch.float32)
    scales = whole.abs().amax(-1) / largest
    # A token of zeros, or one too small to be divided by, is sent as zeros.
    safe = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    codes = (whole / safe[..., None]).round_().clamp_(-largest, largest)
    return scales.contiguous(), codes


def _bytes_of(array: _Array, little_endian: str) -> torch.Tensor:
    flat = np.ascontiguousarray(array).astype(little_endian, copy=False).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat)


# ---- in


def coded_bytes(coding: str, shape: tuple[int, ...], kept: int) -> int:
    """Length of the frame in bytes; a Python integer, so that no product is too large for it."""
    *outer, width = shape
    tokens = math.prod(outer)
    match coding:
        case "grid16":
            return 2 * tokens * width
        case "int8":
            return tokens * (4 + width)
        case "int4":
            return tokens * (4 + (width + 1) // 2)
        case "topk":
            return 4 * tokens * kept
    raise InternalError(f"There is no coding {coding!r}.")


def decode(buffer: Any, *, coding: str, shape: tuple[int, ...], step: float, kept: int) -> torch.Tensor:
    """The numbers in a frame whose length has been checked, float32 [B, T, D].

    Args:
        buffer: bytes of the frame.
        coding, shape, step, kept: as the header says.

    Raises:
        WireError: a column that the tensor does not have.
    """
    raw = np.frombuffer(buffer, dtype=np.uint8)
    *outer, width = shape
    tokens = math.prod(outer)
    if coding == "grid16":
        return torch.from_numpy(raw.view("<i2").astype(np.float32) * np.float32(step)).reshape(shape)
    if coding == "topk":
        return _decode_topk(raw, shape, kept)
    scales = torch.from_numpy(raw[: 4 * tokens].view("<f4").astype(np.float32)).reshape(*outer, 1)
    codes = raw[4 * tokens :]
    if coding == "int8":
        whole = torch.from_numpy(codes.view(np.int8).astype(np.float32)).reshape(shape)
    else:
        pairs = torch.from_numpy(codes.copy()).reshape(*outer, (width + 1) // 2)
        nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)[..., :width]
        whole = nibbles.to(torch.float32) - 8
    return whole * scales


def _decode_topk(raw: _Array, shape: tuple[int, ...], kept: int) -> torch.Tensor:
    *outer, width = shape
    count = math.prod(outer) * kept
    columns = torch.from_numpy(raw[: 2 * count].view("<u2").astype(np.int64)).reshape(*outer, kept)
    if bool((columns >= width).any()):
        raise WireError("A top-k frame names a column that the cut does not have.", expected=f"below {width}")
    values = torch.from_numpy(raw[2 * count :].view("<f2").astype(np.float32)).reshape(*outer, kept)
    return torch.zeros(shape).scatter_(-1, columns, values)
