"""Looking for private integers in bytes that crossed: token ids and labels, however they are aligned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

WINDOW = 4
"""Consecutive token ids that count as a find; four in a row do not come about by chance."""

_WIDTHS = ("<i4", "<i8")


def windows(sequences: Iterable[Sequence[int]], length: int = WINDOW) -> set[tuple[int, ...]]:
    """Every run of `length` consecutive numbers, runs of one and the same number left out."""
    found = (tuple(ids[at : at + length]) for ids in sequences for at in range(len(ids) - length + 1))
    return {window for window in found if len(set(window)) > 1}


def found_in(haystack: bytes | bytearray, needles: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Those `needles` (all of one length) that stand in `haystack` as little-endian int32 or int64, at any offset."""
    length = len(next(iter(needles)))
    low, high = min(map(min, needles)), max(map(max, needles))
    found: set[tuple[int, ...]] = set()
    for kind in _WIDTHS:
        size = np.dtype(kind).itemsize
        for offset in range(size):
            count = (len(haystack) - offset) // size
            if count < length:
                continue
            numbers = np.frombuffer(haystack, dtype=kind, count=count, offset=offset)
            possible = (numbers >= low) & (numbers <= high)
            runs = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(possible, length).all(axis=1))
            found |= {tuple(map(int, numbers[at : at + length])) for at in runs} & needles
    return found
