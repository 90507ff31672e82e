"""Ciphertexts of a whole update as bytes, and their sum, with numpy alone: no native parser sees what a peer sent.

A fresh RLWE ciphertext at SEAL's 8192 [60, 60] is two polynomials (c0, c1) of 8192 words modulo one prime of 60 bits
(the second prime belongs to key switching, which sums do not need). Ciphertexts are added word by word modulo that
prime, so a coordinator needs no library of homomorphic encryption, no parameters from a peer and no key.

    seeded    seeds, 64 bytes a block, then c0: 8.07 bytes a BFV value. c1 is what SEAL expands from the seed.
    public    c0 of all blocks, then c1 of all blocks: 16.1 bytes a BFV value.

The sum of seeded ciphertexts is the sum of the c0 and the list of seeds: who opens it expands them. So what comes down
is as short as what goes up, and the coordinator adds one polynomial a block in place of two.

Shapes: K blocks, each with `Scheme.slots` values; words uint64 little-endian, each below `DATA_PRIME`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from splitfl.errors import WireError

Form: TypeAlias = Literal["seeded", "public"]
Buffer: TypeAlias = bytes | bytearray | memoryview
Words: TypeAlias = npt.NDArray[np.uint64]

DEGREE = 8192
MODULUS_BITS = (60, 60)
DATA_PRIME = 1152921504606748673
PLAIN_MODULUS = 1073692673
SEED_BYTES = 64
_WORD = 8
_CHUNK = 1 << 14  # words: what is worked on stays in the first caches
_LAZY = 15  # so many words below 2**60 add up to less than 2**64


@dataclass(frozen=True)
class Scheme:
    """How whole numbers are put into ciphertexts."""

    name: Literal["bfv", "ckks"]
    slots: int
    """Values in one ciphertext."""
    largest: int
    """Largest magnitude that a value of a sum may have."""
    finest: int
    """Most steps between 0 and the clip that one update may use."""

    def blocks(self, values: int) -> int:
        """Ciphertexts that so many values fill."""
        return -(-values // self.slots)


BFV = Scheme("bfv", slots=DEGREE, largest=(PLAIN_MODULUS - 1) // 2, finest=1 << 29)
CKKS = Scheme("ckks", slots=DEGREE // 2, largest=1 << 28, finest=1 << 20)
SCHEMES = {scheme.name: scheme for scheme in (BFV, CKKS)}


def polynomials(form: Form) -> int:
    """Polynomials that travel for each block."""
    return 1 if form == "seeded" else 2


def seeds_size(blocks: int, form: Form) -> int:
    """Bytes of seeds in one update."""
    return blocks * SEED_BYTES if form == "seeded" else 0


def words_size(blocks: int, form: Form) -> int:
    """Bytes of words in one update, and in a sum."""
    return blocks * polynomials(form) * DEGREE * _WORD


def read_words(blob: Buffer, blocks: int, form: Form) -> Words:
    """The words of `blob`, without a copy.

    Returns:
        uint64 [polynomials * K * DEGREE].

    Raises:
        WireError: another number of bytes, or a word that is not below `DATA_PRIME`.
    """
    view = memoryview(blob).cast("B")
    expected = words_size(blocks, form)
    if view.nbytes != expected:
        raise WireError(
            f"A ciphertext has {view.nbytes} bytes of polynomials.", expected=f"{expected} for {blocks} blocks, {form}"
        )
    words = np.frombuffer(view, dtype="<u8")
    if words.size and int(words.max()) >= DATA_PRIME:
        raise WireError("A ciphertext has a coefficient that is not reduced.", expected=f"less than {DATA_PRIME}")
    return words


class RunningSum:
    """Sum of ciphertexts, word by word. Holds one sum; what is added may go away at once.

    Args:
        blocks: ciphertexts in one update.
        form: what travels.
    """

    def __init__(self, blocks: int, form: Form) -> None:
        self._sum: Words = np.zeros(words_size(blocks, form) // _WORD, dtype=np.uint64)
        self._unreduced = 0

    def add(self, words: Words) -> None:
        """Add what `read_words` returned."""
        if self._unreduced == _LAZY - 1:  # the reduced sum counts as one
            self._reduce()
        np.add(self._sum, words, out=self._sum)
        self._unreduced += 1

    def words(self) -> memoryview:
        """The sum, reduced, as bytes; valid until the next `add`."""
        self._reduce()
        return self._sum.astype("<u8", copy=False).data.cast("B")

    def _reduce(self) -> None:
        """Bring every word below the prime. It is just below 2^60, so the bits above tell the quotient but for one."""
        prime = np.uint64(DATA_PRIME)
        for start in range(0, self._sum.size, _CHUNK):
            part = self._sum[start : start + _CHUNK]
            part -= (part >> np.uint64(60)) * prime
            np.minimum(part, part - prime, out=part)  # below the prime, the difference wraps round to something large
        self._unreduced = 0
