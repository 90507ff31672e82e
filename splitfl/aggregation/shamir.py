"""A secret of 32 bytes in n shares, any t of which give it back and fewer say nothing (Shamir 1979).

Over the integers modulo P = 2^256 + 297, the smallest prime above 2^256: the secret is a polynomial's value at 0, its
other t - 1 coefficients are uniform, the share of holder x in 1..n is the value at x.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from splitfl.errors import InternalError, WireError

PRIME = 2**256 + 297
SECRET = 32
SHARE = 33
"""Bytes of a share, little-endian."""


def split(secret: bytes, holders: int, threshold: int) -> list[bytes]:
    """Shares of `secret` (32 bytes) for holders 1, 2, ..., in that order.

    Raises:
        InternalError: not 32 bytes, or not 1 <= threshold <= holders.
    """
    if len(secret) != SECRET or not 1 <= threshold <= holders:
        raise InternalError(f"{len(secret)} bytes cannot be split among {holders}, any {threshold} of which suffice.")
    coefficients = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, holder).to_bytes(SHARE, "little") for holder in range(1, holders + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from as many shares as its threshold says, by holder (from 1).

    From fewer shares, or changed ones, it is another secret, or an error: whoever combines must be able to recognise
    the right one.

    Raises:
        WireError: a share is none, or what comes out is no secret of 32 bytes.
    """
    points = {holder: int.from_bytes(share, "little") for holder, share in shares.items()}
    if any(len(share) != SHARE for share in shares.values()) or any(value >= PRIME for value in points.values()):
        raise WireError("A share of a secret is malformed.", expected=f"{SHARE} bytes, below the prime")
    total = 0
    for holder, value in points.items():
        above = below = 1
        for other in points:
            if other != holder:
                above = above * other % PRIME
                below = below * (other - holder) % PRIME
        total += value * above * pow(below, -1, PRIME)
    total %= PRIME
    if total >= 1 << 8 * SECRET:
        raise WireError("Shares of a secret do not fit together.", expected="shares as their owner made them")
    return total.to_bytes(SECRET, "little")


def _value(coefficients: list[int], at: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * at + coefficient) % PRIME
    return value
