"""Proof that an opened sum is the sum of the updates of exactly these parties: a linear tag under the group's secret.

Whoever adds ciphertexts can also leave one out, add one twice, or add something of its own, and the sum still opens. So
each update x (whole numbers, d of them) carries tags modulo the prime p, which is below 2^30:

    tag_j(party, x) = sum_i r_ji x_i + f_j(party)  mod p,      j = 1 .. 4

The coefficients r come from an AES-256 keystream and f from HMAC-SHA256, both under keys that the parties have and the
adder has not. Tags add up like the updates: the tags of a sum are the sum of the tags, if and only if (but for chance)
x is the sum of what the named parties encrypted. For any other x, each tag fits with a probability of at most 2^-29:
r_ji is uniform on [0, 2^30), so no residue modulo p has more than two of its values. Four tags: 2^-116. The idea is
that of Agrawal and Boneh, "Homomorphic MACs", 2009.

Does not hide anything by itself (tags are encrypted with the update), and does not bind a party of the group, who has
the keys. A tag travels as two whole numbers of 15 bits.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from splitfl.aggregation.lattice import PLAIN_MODULUS

TAGS = 4
LIMBS = 2 * TAGS
"""Whole numbers that the tags of one update take."""

_LIMB_BITS = 15
_COEFFICIENT = np.uint32((1 << 30) - 1)
_CHUNK = 1 << 16
_LOW = np.uint64((1 << 32) - 1)

Whole = npt.NDArray[np.int32]


def tag(secret: bytes, party: str, values: Whole) -> Whole:
    """The tags of one party's update.

    Args:
        secret: 32 bytes for this round alone.
        party: its public key (Z85).
        values: int32 [d].

    Returns:
        int32 [LIMBS], each from 0 to 2^15 - 1.
    """
    limbs = [part for residue in _tags(secret, [party], values) for part in divmod(residue, 1 << _LIMB_BITS)]
    return np.array(limbs, dtype=np.int32)


def fits(secret: bytes, parties: Sequence[str], values: Whole, limbs: Whole) -> bool:
    """Whether `limbs` are the sum of the tags of updates of `parties` whose sum is `values`."""
    found = [(int(high) << _LIMB_BITS) + int(low) for high, low in limbs.reshape(TAGS, 2)]
    return all(
        (have - want) % PLAIN_MODULUS == 0 for have, want in zip(found, _tags(secret, parties, values), strict=True)
    )


def _tags(secret: bytes, parties: Sequence[str], values: Whole) -> list[int]:
    """The tags that the sum `values` of the updates of `parties` must have."""
    totals = [sum(_of_party(secret, number, party) for party in parties) for number in range(TAGS)]
    streams = [_coefficients(secret, number) for number in range(TAGS)]
    zeros = memoryview(bytes(4 * _CHUNK))
    for start in range(0, len(values), _CHUNK):
        part = np.remainder(values[start : start + _CHUNK], np.int32(PLAIN_MODULUS)).astype(np.uint64)
        for number, stream in enumerate(streams):
            words = np.frombuffer(stream.update(zeros[: 4 * len(part)]), dtype="<u4")
            products = part * (words & _COEFFICIENT)  # below 2^60
            totals[number] += (int((products >> np.uint64(32)).sum()) << 32) + int((products & _LOW).sum())
    return [total % PLAIN_MODULUS for total in totals]


def _coefficients(secret: bytes, number: int) -> CipherContext:
    key = hmac.digest(secret, b"splitfl sum tag coefficients" + bytes([number]), "sha256")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _of_party(secret: bytes, number: int, party: str) -> int:
    mac = hmac.digest(secret, b"splitfl sum tag of a party" + bytes([number]) + party.encode("ascii"), "sha256")
    return int.from_bytes(mac, "big") % PLAIN_MODULUS
