"""Coded frames once more, from the table in docs/wire.md: with `struct`, in plain Python, one number at a time."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

from splitfl.wire.coding import encode_grid16, encode_int4, encode_int8, encode_topk


def int_codes(x):
    return torch.arange(x.numel()).reshape(x.shape) - x.numel() // 2


def encoded(name, x, kept=None):
    match name:
        case "grid16":
            return encode_grid16(int_codes(x), 2.0**-5)
        case "int8":
            return encode_int8(x)
        case "int4":
            return encode_int4(x)
        case "topk":
            return encode_topk(x, max(1, x.shape[-1] // 2) if kept is None else kept)
    raise AssertionError(name)


def unpack(coded):
    """Scales or columns, and codes or values, as plain Python numbers: the table in docs/wire.md, read literally.

    Returns:
        First part, one list a token (None for grid16), and second part, one list a token.
    """
    raw = bytes(coded.payload.tolist())
    *outer, width = coded.shape
    tokens, kept = math.prod(outer), coded.kept
    match coded.coding:
        case "grid16":
            first, second = None, struct.unpack(f"<{tokens * width}h", raw)
        case "int8":
            first = struct.unpack(f"<{tokens}f", raw[: 4 * tokens])
            second = struct.unpack(f"<{tokens * width}b", raw[4 * tokens :])
        case "int4":
            first, pairs = struct.unpack(f"<{tokens}f", raw[: 4 * tokens]), raw[4 * tokens :]
            each = -(-width // 2)
            assert len(pairs) == tokens * each
            second = [
                (pairs[token * each + column // 2] >> (4 * (column % 2)) & 15) - 8
                for token in range(tokens)
                for column in range(width)
            ]
        case "topk":
            flat = struct.unpack(f"<{tokens * kept}H", raw[: 2 * tokens * kept])
            first = [flat[t * kept : (t + 1) * kept] for t in range(tokens)]
            second, width = struct.unpack(f"<{tokens * kept}e", raw[2 * tokens * kept :]), kept
    return first, [list(second[t * width : (t + 1) * width]) for t in range(tokens)]


def numbers(coded):
    """What the receiver must compute with, from `unpack`, in float32 arithmetic, one number at a time."""
    first, second = unpack(coded)
    out = np.zeros((len(second), coded.shape[-1]), np.float32)
    with np.errstate(all="ignore"):
        for token, codes in enumerate(second):
            for place, code in enumerate(codes):
                match coded.coding:
                    case "topk":
                        out[token, first[token][place]] = code
                    case "grid16":
                        out[token, place] = code * coded.step
                    case _:
                        out[token, place] = np.float32(code) * np.float32(first[token])
    return torch.from_numpy(out).reshape(coded.shape)
