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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from splitfl.errors import InternalError, WireError
from splitfl.wire.messages import CodingName

__all__ = ["CODINGS", "Coded", "coded_bytes", "decode", "encode_grid16", "encode_int4", "encode_int8", "encode_topk"]

CODINGS: frozenset[str] = frozenset(get_args(CodingName)) - {"raw"}
WIDEST = 65_536  # columns that a 16-bit index can name
_BLOCK = 262_144  # numbers; measured: fewer cost more calls, more leave the cache

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
        InternalError: `step` is no power of two, or one that a receiver refuses.
    """
    if not 2.0**-60 <= step <= 2.0**60 or math.frexp(step)[0] != 0.5:
        raise InternalError(f"A grid step of {step!r} was to be sent.", expected="a power of two, 2^-60 to 2^60")
    narrow = codes.clamp(-32768, 32767).to(device="cpu", dtype=torch.int16).contiguous()
    return Coded(coding="grid16", shape=tuple(codes.shape), payload=_bytes_of(narrow.numpy(), "<i2"), step=float(step))


def encode_int8(x: torch.Tensor) -> Coded:
    """`x` float [B, T, D] as ``int8``: per token, the largest magnitude becomes 127. What is not finite stays so."""
    whole = _tokens_of(x)
    payload, scales, codes = _room_for("int8", tuple(x.shape))
    narrow = torch.from_numpy(codes.view(np.int8))
    for at, block in _scaled(whole, 127, scales):
        narrow[at] = block
    return Coded(coding="int8", shape=tuple(x.shape), payload=payload)


def encode_int4(x: torch.Tensor) -> Coded:
    """`x` float [B, T, D] as ``int4``: per token, the largest magnitude becomes 7. What is not finite stays so."""
    whole = _tokens_of(x)
    payload, scales, codes = _room_for("int4", tuple(x.shape))
    width, pairs = whole.shape[1], codes.shape[1]
    nibbles = np.zeros((_block_of(width), 2 * pairs), np.int8)  # an odd width leaves the last column 0
    for at, block in _scaled(whole, 7, scales):
        some = nibbles[: len(block)]
        torch.from_numpy(some)[:, :width] = block.add_(8)
        both = some.view("<u2")  # the even column in the low byte
        codes[at] = (both | both >> 4) & 0xFF
    return Coded(coding="int4", shape=tuple(x.shape), payload=payload)


def encode_topk(x: torch.Tensor, kept: int) -> Coded:
    """`x` float [B, T, D] as ``topk``: of each token, the `kept` numbers of largest magnitude.

    Beyond float16 they saturate; infinity does not, for the receiver is to refuse it.

    Raises:
        InternalError: `kept` is not 1 to D, or D is beyond what a 16-bit column can name.
    """
    if not 1 <= kept <= x.shape[-1] <= WIDEST:
        raise InternalError(f"Of {x.shape[-1]} numbers, {kept} were to be kept.", expected=f"1 to D, D up to {WIDEST}")
    whole = x.detach().to("cpu", torch.float32)
    columns = whole.abs().topk(kept, dim=-1, sorted=False).indices
    values = whole.gather(-1, columns)
    narrow = torch.where(values.isinf(), values, values.clamp(-65504, 65504)).to(torch.float16)
    payload = torch.cat([_bytes_of(columns.numpy().astype("<u2"), "<u2"), _bytes_of(narrow.numpy(), "<f2")])
    return Coded(coding="topk", shape=tuple(x.shape), payload=payload, kept=kept)


def _tokens_of(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., D] as float32 [tokens, D] in CPU memory; may share it."""
    return x.detach().to("cpu", torch.float32).reshape(-1, x.shape[-1])


def _room_for(coding: CodingName, shape: tuple[int, ...]) -> tuple[torch.Tensor, _Array, _Array]:
    """An unwritten payload, and the two parts of it: float32 scales [tokens], and bytes [tokens, codes of a token]."""
    tokens = math.prod(shape[:-1])
    payload = torch.empty(coded_bytes(coding, shape, 0), dtype=torch.uint8)
    raw = payload.numpy()
    return payload, raw[: 4 * tokens].view("<f4"), raw[4 * tokens :].reshape(tokens, -1)


def _block_of(width: int) -> int:
    """Tokens that are coded at once: so few that what is made of them stays in the processor's cache."""
    return max(1, _BLOCK // width)


def _scaled(whole: torch.Tensor, largest: int, scales: _Array) -> Iterator[tuple[slice, torch.Tensor]]:
    """Block after block of `whole` [tokens, D], each number over its token's scale, rounded to [-largest, largest].

    Fills `scales` first. Yields the tokens of a block, and float32 [block, D] in memory that the next block takes over.
    """
    count = _block_of(whole.shape[1])
    work = torch.empty(min(count, len(whole)), whole.shape[1], dtype=torch.float32)
    scale = torch.empty(len(whole), dtype=torch.float32)
    for part, out in zip(whole.split(count), scale.split(count), strict=True):
        torch.amax(torch.abs(part, out=work[: len(part)]), -1, out=out)
    scale /= largest
    # The largest number of float32 would come back as infinity; infinity itself must.
    ceiling = torch.finfo(torch.float32).max * (1 - 2**-23) / largest
    scale = torch.where(scale.isinf(), scale, scale.clamp(max=ceiling))
    scales[:] = scale.numpy()
    # A token of zeros, or one too small to be divided by, is sent as zeros. One with a NaN has a scale that says so.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.inf)[:, None]
    start = 0
    for part, divisor in zip(whole.split(count), scale.split(count), strict=True):
        at = slice(start, start := start + len(part))
        yield at, torch.div(part, divisor, out=work[: len(part)]).round_()


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
    return torch.zeros(shape, dtype=torch.float32).scatter_(-1, columns, values)
