"""`ckks`: the scheme that other systems sum with; twice the bytes of `bfv`, on a coarser grid.

SEAL's 8192 [60, 60] at scale 2^50, 4096 values in a ciphertext. A CKKS decryption is the message plus the noise of the
ciphertext, and two of them give the secret key away (`splitfl.audit.attacks.ckks_key` does it). Here updates lie on a
grid of 2^-20 of the clip before they are encrypted, and what is opened is moved to that grid inside the process that
opens. The noise is some 2^-17 of a step, so that what comes out is the exact sum of what went in and a function of
nothing else; a value that is not next to a grid point is refused, and not shown. No call hands out the rest.
"""

from __future__ import annotations

from splitfl.aggregation.encrypted import EncryptedSealer, EncryptedSummer
from splitfl.aggregation.lattice import CKKS


class CkksSealer(EncryptedSealer):
    """A party's side."""

    scheme = CKKS


class CkksSummer(EncryptedSummer):
    """The coordinator's side."""

    scheme = CKKS
