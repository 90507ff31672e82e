"""Pseudorandom vectors from 32-byte keys, added to and taken from a vector modulo 2^32.

The stream is AES-256 in counter mode under the full key: what AES-256-GCM adds to the text (NIST SP 800-38D, counter
from 2, one fixed nonce), without the tag. OpenSSL has vector code for GCM but not for plain CTR, which makes it twice
as fast here, the tag's computation included. Each key is used for one stream only, which is why a fixed nonce is safe.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from splitfl.errors import InternalError

Ring = npt.NDArray[np.uint32]
Keyed = tuple[bytes, int]
"""A stream's key, and +1 to add it or -1 to take it away."""

KEY_BYTES = 32
CHUNK = 1 << 16
"""Values worked on at a time: with the stream they stay in the second-level cache."""
_LONGEST = 1 << 33  # values of one stream; GCM's counter ends at 2^36 bytes
_NONCE = bytes(12)
_LINE = 64  # bytes


class Keystream:
    """The stream of one key, in pieces.

    Args:
        key: 32 bytes, used for nothing else.
        largest: bytes of the largest piece.
    """

    def __init__(self, key: bytes, largest: int) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.GCM(_NONCE)).encryptor()
        self._zeros, self._held = aligned(largest), aligned(largest)

    def next(self, count: int) -> npt.NDArray[np.uint8]:
        """The next so many bytes: a view that the call after this one writes over."""
        held = self._held[:count]
        self._encryptor.update_into(self._zeros[:count], held)
        return np.frombuffer(held, dtype=np.uint8)


def add_streams(vector: Ring, keys: Iterable[Keyed]) -> None:
    """Add the stream of each key to `vector` (uint32, in place), or take it away."""
    if len(vector) > _LONGEST:
        raise InternalError(f"{len(vector)} values are too many for one stream.")
    size = min(CHUNK, max(1, len(vector)))
    zeros, held = aligned(4 * size), aligned(4 * size)
    stream = np.frombuffer(held, dtype=np.uint32)
    streams = [(Cipher(algorithms.AES(key), modes.GCM(_NONCE)).encryptor(), sign) for key, sign in keys]
    for start in range(0, len(vector), size):
        part = vector[start : start + size]
        count = len(part)
        nothing, here, values = zeros[: 4 * count], held[: 4 * count], stream[:count]
        for encryptor, sign in streams:
            encryptor.update_into(nothing, here)
            (np.add if sign > 0 else np.subtract)(part, values, out=part)


def aligned(size: int, *, zeros: bool = True) -> memoryview:
    """So many bytes from the beginning of a cache line on: vector loads that straddle two cost a twelfth here.

    Args:
        zeros: whether they are 0; else they hold anything, and every one must be written before it is read.
    """
    room = np.empty(size + _LINE, dtype=np.uint8)
    if zeros:
        room[:] = 0
    start = -room.ctypes.data % _LINE
    return room.data[start : start + size]
