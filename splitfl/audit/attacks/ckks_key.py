"""The secret key of a CKKS sum from two published decryptions: ``python -m splitfl.audit.attacks.ckks_key``.

Li and Micciancio, "On the Security of Homomorphic Encryption on Approximate Numbers", Eurocrypt 2021. A ciphertext
(c0, c1) of m under the key s decrypts to

    m' = c0 + c1 s  mod q,          m' = m + noise

and what is published, real numbers at full precision, is m' itself: encoding them again gives it back. Decoding keeps
the real half, so what comes back is m' and its conjugate together; encoding at twice the scale yields m' + conj(m').
SEAL keeps polynomials at the roots of unity (NTT form), where products are taken index by index and the conjugate of
index i of N is index N - 1 - i. With i* = N - 1 - i,

    c1[i] s[i] + c1[i*] s[i*] = (m' + conj m')[i] - c0[i] - c0[i*]  mod q

is one linear equation in two unknowns, and a second ciphertext under the same key is the second. An update of a million
values has 245 ciphertexts under one key.

The same is tried on what the `ckks` of splitfl publishes: the sum moved to the grid that the updates lie on. The noise
is then gone from it, the equations have a wrong right-hand side, and the solution is no key. What is shown is that
this attack fails. Why it must: an honest sum on the grid follows from the updates alone (`splitfl.aggregation.ckks`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from splitfl.aggregation.he_child import Engine, Integers, key_words
from splitfl.aggregation.lattice import CKKS, DATA_PRIME, DEGREE, RunningSum, Words
from splitfl.aggregation.seal_objects import CKKS_SCALE, Parameters, Scratch, parameters

Floats = npt.NDArray[np.float64]
_HALF = DEGREE // 2


@dataclass(frozen=True)
class Published:
    """A sum that an adversary sees: the ciphertext, and the numbers in it."""

    polynomials: Words
    """c0 and c1, uint64 [2, DEGREE], NTT form."""
    numbers: Floats
    """float64 [CKKS.slots], as they were given out."""


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt."""

    words: int
    """Words of the key that are right, of `DEGREE`."""
    explains: int
    """Equations of a third sum that the solution fulfils, of `DEGREE` / 2: an adversary's own check."""
    seconds: float
    """Time that the recovery took."""
    reads: float | None
    """Largest error of another party's update that was read with the key; None if there was no key to read it with."""


def recover(known: Parameters, first: Published, second: Published) -> Words:
    """The key that two published sums under it stand for, if they are raw.

    Args:
        known: the public parameters.

    Returns:
        uint64 [DEGREE]: the key modulo the data prime, NTT form; anything if the sums were not raw.
    """
    (a, b, right), (c, d, below) = _equations(known, first), _equations(known, second)
    determinants = [(u * x - v * w) % DATA_PRIME for u, v, w, x in zip(a, b, c, d, strict=True)]
    key = [0] * DEGREE
    for i, inverse in enumerate(_inverses(determinants)):
        key[i] = (right[i] * d[i] - below[i] * b[i]) * inverse % DATA_PRIME
        key[DEGREE - 1 - i] = (below[i] * a[i] - right[i] * c[i]) * inverse % DATA_PRIME
    return np.array(key, dtype=np.uint64)


def explained(known: Parameters, key: Words, third: Published) -> int:
    """How many of the equations of another sum the key fulfils; all `DEGREE` / 2 if it is the key."""
    a, b, right = _equations(known, third)
    low, high = key[:_HALF].tolist(), key[: _HALF - 1 : -1].tolist()
    return sum((u * x + v * y - r) % DATA_PRIME == 0 for u, v, r, x, y in zip(a, b, right, low, high, strict=True))


def read(known: Parameters, key: Words, polynomials: Words) -> Floats:
    """The numbers in any ciphertext under the key; float64 [CKKS.slots]."""
    c0, c1 = (row.tolist() for row in polynomials)
    words = [(x + y * s) % DATA_PRIME for x, y, s in zip(c0, c1, key.tolist(), strict=True)]
    plaintext = known.encoded(np.array(words, dtype=np.uint64), CKKS_SCALE)
    return np.array(seal.CKKSEncoder(known.context).decode_double(plaintext))


def attack(known: Parameters, sums: Sequence[Published], victim: Words, update: Floats, true_key: Words) -> Outcome:
    """Recover from two of three sums, and judge what was recovered.

    Args:
        victim: a ciphertext that nobody has opened, [2, DEGREE].
        update: what is in it.
        true_key: uint64 [DEGREE], for the count alone.
    """
    start = time.perf_counter()
    key = recover(known, sums[0], sums[1])
    seconds = time.perf_counter() - start
    explains = explained(known, key, sums[2])
    found = explains == _HALF
    reads = float(np.abs(read(known, key, victim)[: update.size] - update).max()) if found else None
    return Outcome(words=int((key == true_key).sum()), explains=explains, seconds=seconds, reads=reads)


def scene(*, raw: bool, parties: int = 4) -> Outcome:
    """A sum of `parties` updates of three ciphertexts each, published raw or as splitfl does, and the attack on it."""
    scratch = Scratch()
    try:
        known, secret = parameters(CKKS, scratch), os.urandom(32)
        engine, true_key = Engine(known, secret), key_words(scratch, secret)[:DEGREE]
        generator = np.random.default_rng()
        updates = [generator.normal(0, 0.01, 3 * CKKS.slots).clip(-0.5, 0.5) for _ in range(parties)]
        whole = [np.rint(update * CKKS.finest).astype(np.int32) for update in updates]
        each = [_ciphertexts(engine, values) for values in whole]
        total = _sum(each)
        numbers = _raw(engine, total) if raw else _as_published(engine, total, 3 * CKKS.slots)
        sums = [Published(total[:, block], numbers[block]) for block in range(3)]
        first = whole[0][: CKKS.slots] / CKKS.finest
        return attack(known, sums, each[0][:, 0], first, true_key)
    finally:
        scratch.close()


def main() -> None:
    """Print what both attempts recover."""
    for words, raw in (("published raw", True), ("published by splitfl", False)):
        outcome = scene(raw=raw)
        print(
            f"{words:<21} {outcome.words:5d} of {DEGREE} words of the key in {1e3 * outcome.seconds:.1f} ms; "
            f"explains {outcome.explains} of {_HALF} equations of a third sum"
        )
        if outcome.reads is not None:
            print(f"{'':<21} read with it: an update that was never opened, to within {outcome.reads:.1e}")


def _equations(known: Parameters, published: Published) -> tuple[list[int], list[int], list[int]]:
    """Coefficients of s[i] and of s[i*], and the right-hand side, for the first half of the indices."""
    plaintext = seal.Plaintext()
    seal.CKKSEncoder(known.context).encode(published.numbers.tolist(), 2 * CKKS_SCALE, plaintext)
    twice = known.coefficients(plaintext).tolist()
    c0, c1 = (row.tolist() for row in published.polynomials)
    right = [(twice[i] - c0[i] - c0[DEGREE - 1 - i]) % DATA_PRIME for i in range(_HALF)]
    return c1[:_HALF], c1[: _HALF - 1 : -1], right


def _inverses(values: Sequence[int]) -> list[int]:
    """Of all `values` modulo the prime, with one inversion (Montgomery's trick)."""
    products, running = [], 1
    for value in values:
        products.append(running)
        running = running * value % DATA_PRIME
    inverse = pow(running, -1, DATA_PRIME)
    out = [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        out[i] = inverse * products[i] % DATA_PRIME
        inverse = inverse * values[i] % DATA_PRIME
    return out


def _ciphertexts(engine: Engine, values: Integers) -> Words:
    """An update as the parties send it in the public form, [2, K, DEGREE]."""
    words = np.frombuffer(b"".join(engine.encrypt(values, "public")), dtype="<u8")
    return words.reshape(2, -1, DEGREE)


def _sum(each: Sequence[Words]) -> Words:
    blocks = each[0].shape[1]
    running = RunningSum(blocks, "public")
    for words in each:
        running.add(words.reshape(-1))
    return np.frombuffer(running.words(), dtype="<u8").reshape(2, blocks, DEGREE)


def _raw(engine: Engine, total: Words) -> list[Floats]:
    """What a plain CKKS library hands out."""
    return [
        np.array(engine.raw(engine.known.ciphertext(total[0, block], total[1, block])))
        for block in range(total.shape[1])
    ]


def _as_published(engine: Engine, total: Words, count: int) -> list[Floats]:
    """What leaves the process that opens, in splitfl."""
    opened = engine.open([], total, count) / CKKS.finest
    return list(opened.reshape(-1, CKKS.slots))


if __name__ == "__main__":
    main()
