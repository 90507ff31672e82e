"""`bfv`: sums of whole numbers under BFV, exact; 8.07 bytes a value seeded, 16.1 by public key.

SEAL's 8192 [60, 60] with a plaintext modulus of 30 bits. Values are the coefficients of the plaintext polynomial, 8192
in a ciphertext: sums need no slots, and what is opened is the sum itself, without the noise of the ciphertexts.
"""

from __future__ import annotations

from splitfl.aggregation.encrypted import EncryptedSealer, EncryptedSummer
from splitfl.aggregation.lattice import BFV


class BfvSealer(EncryptedSealer):
    """A party's side."""

    scheme = BFV


class BfvSummer(EncryptedSummer):
    """The coordinator's side."""

    scheme = BFV
