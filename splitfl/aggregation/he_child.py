"""The child process that holds TenSEAL: ``python -m splitfl.aggregation.he_child``.

TenSEAL's native code keeps the interpreter's lock for as long as a call takes: in the main process, heartbeats would
stop. And what a native library does with a bad ciphertext stays in here. The child keeps no state that matters: every
request carries what it needs, so a child that died is simply replaced.

    request   op, scheme, form: 1 byte each; secret 32; values, updates, length of the body: uint64; the body
    answer    status 1 byte (+ or -); length uint64; the body, or a sentence

    E   encrypt   body int32 [values]                              answer: seeds, then words
    O   open      body seeds of every update, then words of the sum   answer: int32 [values], rounded
    K   check     no body                                          answer: nothing

Raw decryptions of CKKS never leave: they carry the noise, and noise is key (see `splitfl.audit.attacks.ckks_key`). What
is encrypted lies on a grid; an opened value is moved to the grid point it is next to, and if one is not close to any,
nothing is answered at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from splitfl.aggregation.he_frames import ANSWER, FORMS, OPS, REQUEST, fill, scheme_and_form
from splitfl.aggregation.lattice import (
    CKKS,
    DEGREE,
    PLAIN_MODULUS,
    SCHEMES,
    SEED_BYTES,
    Form,
    Scheme,
    Words,
    polynomials,
    read_words,
    seeds_size,
)
from splitfl.aggregation.seal_objects import Parameters, Scratch, parameters
from splitfl.errors import SplitflError, WireError

_CKKS_TOLERANCE = 2.0**-6  # of a grid step; the noise of a hundred honest ciphertexts stays below 2**-14

Integers = npt.NDArray[np.int32]


class Engine:
    """One secret key under one scheme.

    Args:
        known: SEAL's parameters.
        secret: 32 bytes that every party of the round has; the key follows from them.
    """

    def __init__(self, known: Parameters, secret: bytes) -> None:
        self.known = known
        key = known.secret_key(key_words(known.scratch, secret))
        public = seal.PublicKey()
        seal.KeyGenerator(known.context, key).create_public_key(public)
        self.encryptor = seal.Encryptor(known.context, public, key)
        self.decryptor = seal.Decryptor(known.context, key)
        self._evaluator = seal.Evaluator(known.context)
        self._encoder = seal.CKKSEncoder(known.context) if known.scheme is CKKS else None

    def encrypt(self, values: Integers, form: Form) -> list[bytes]:
        """Seeds and words, in parts, of `values` [V]."""
        seeds: list[bytes] = []
        polys: list[list[bytes]] = [[] for _ in range(polynomials(form))]
        for start in range(0, values.size, self.known.scheme.slots):
            plaintext = self._encode(values[start : start + self.known.scheme.slots])
            if form == "seeded":
                c0, seed = self.known.seeded(self.encryptor.encrypt_symmetric(plaintext))
                seeds.append(seed)
                polys[0].append(c0.tobytes())
            else:
                ciphertext = seal.Ciphertext()
                self.encryptor.encrypt(plaintext, ciphertext)
                for into, words in zip(polys, self.known.polynomials(ciphertext), strict=True):
                    into.append(words.tobytes())
        return [*seeds, *(part for poly in polys for part in poly)]

    def open(self, seeds: list[list[bytes]], words: Words, count: int) -> Integers:
        """The whole numbers behind a sum.

        Args:
            seeds: of every update, of every block; empty in the public form.
            words: of the sum, [polynomials, K, DEGREE].
            count: values.

        Raises:
            WireError: it is no sum of updates under this key.
        """
        blocks = [
            self._decode(self._block([row[index] for row in seeds], words[:, index])) for index in range(words.shape[1])
        ]
        return np.concatenate(blocks)[:count]

    def raw(self, ciphertext: Any) -> list[float]:
        """A CKKS ciphertext decrypted with nothing removed: for the audit and for tests alone."""
        plaintext = seal.Plaintext()
        self.decryptor.decrypt(ciphertext, plaintext)
        return list(self._ckks.decode_double(plaintext))

    def _block(self, seeds: list[bytes], words: Words) -> Any:
        """One ciphertext of the sum. All c0 are in the first; the others bring only what their seed expands to."""
        if not seeds:
            return self.known.ciphertext(words[0], words[1])
        total = self.known.ciphertext(words[0], seeds[0])
        nothing = np.zeros(DEGREE, dtype=np.uint64)
        for seed in seeds[1:]:
            self._evaluator.add_inplace(total, self.known.ciphertext(nothing, seed))
        return total

    def _encode(self, values: Integers) -> Any:
        if self._encoder is None:
            words = np.zeros(DEGREE, dtype=np.uint64)
            words[: values.size] = np.remainder(values.astype(np.int64), PLAIN_MODULUS)
            return self.known.plaintext(words)
        plaintext = seal.Plaintext()
        slots = np.zeros(CKKS.slots)
        slots[: values.size] = values / CKKS.finest
        self._encoder.encode(slots.tolist(), self.known.scale, plaintext)
        return plaintext

    def _decode(self, ciphertext: Any) -> Integers:
        if self._encoder is not None:
            return _to_grid(np.array(self.raw(ciphertext)))
        plaintext = seal.Plaintext()
        self.decryptor.decrypt(ciphertext, plaintext)
        found = self.known.coefficients(plaintext).astype(np.int64)
        found[found > (PLAIN_MODULUS - 1) // 2] -= PLAIN_MODULUS
        return found.astype(np.int32)

    @property
    def _ckks(self) -> Any:
        if self._encoder is None:
            raise TypeError("BFV decrypts to whole numbers")
        return self._encoder


def key_words(scratch: Scratch, secret: bytes) -> Words:
    """The words of the secret key that belongs to 32 bytes, the same on every machine.

    Uniform ternary coefficients, as SEAL's own keys have, from an AES-256 keystream under `secret`: five for each byte
    below 3^5, other bytes are left out. SEAL's seeded generator is no way to do this: it draws through
    ``std::uniform_int_distribution``, which every C++ library implements in its own manner.
    """
    stream = Cipher(algorithms.AES(secret), modes.CTR(bytes(16))).encryptor().update(bytes(4096))
    kept = np.frombuffer(stream, dtype=np.uint8)
    kept = kept[kept < 3**5].astype(np.int64)
    digits = (kept[:, None] // 3 ** np.arange(5) % 3).reshape(-1)[:DEGREE]
    known = parameters(SCHEMES["bfv"], scratch)
    plaintext = known.plaintext(np.remainder(digits - 1, PLAIN_MODULUS).astype(np.uint64))
    seal.Evaluator(known.context).transform_to_ntt_inplace(plaintext, known.context.key_parms_id())
    return known.key_words(plaintext)


def _to_grid(values: npt.NDArray[np.float64]) -> Integers:
    steps = values * CKKS.finest
    nearest = np.rint(steps)
    # Also where a value is not finite. One answer for everything: how far off it was is noise, which is not shown.
    if not bool(np.all((np.abs(steps - nearest) < _CKKS_TOLERANCE) & (np.abs(nearest) <= CKKS.largest))):
        raise WireError(
            "The sum does not lie on the grid that updates lie on.", expected="a sum of updates of this round"
        )
    return nearest.astype(np.int32)


class Answering:
    """Takes requests one by one; keeps the last key."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._last: tuple[str, bytes, Engine] | None = None

    def close(self) -> None:
        """Remove what SEAL's objects passed through."""
        self._scratch.close()

    def answer(self, head: bytes, body: bytearray) -> Sequence[bytes]:
        """Parts of the answer's body.

        Raises:
            SplitflError, ValueError, RuntimeError: there is none; the last two come from SEAL.
        """
        op, scheme_code, form_code, secret, values, updates, _ = REQUEST.unpack(head)
        scheme, form = scheme_and_form(scheme_code, form_code)
        if op == OPS["check"]:
            return _self_check(self._scratch)
        engine = self._engine(scheme, secret)
        if op == OPS["encrypt"]:
            return engine.encrypt(np.frombuffer(body, dtype="<i4"), form)
        blocks = scheme.blocks(values)
        split = updates * seeds_size(blocks, form)
        view = memoryview(body)
        words = read_words(view[split:], blocks, form).reshape(polynomials(form), blocks, DEGREE)
        flat = [bytes(view[at : at + SEED_BYTES]) for at in range(0, split, SEED_BYTES)]
        seeds = [flat[start : start + blocks] for start in range(0, len(flat), blocks)]
        return [engine.open(seeds, words, values).astype("<i4").tobytes()]

    def _engine(self, scheme: Scheme, secret: bytes) -> Engine:
        if self._last is None or self._last[:2] != (scheme.name, secret):
            self._last = (scheme.name, secret, Engine(parameters(scheme, self._scratch), secret))
        return self._last[2]


def _self_check(scratch: Scratch) -> list[bytes]:
    """Whether this build of TenSEAL does what is relied on: two small updates, both forms, both schemes."""
    values = np.array([1, -2, 3000], dtype=np.int32)
    for scheme in SCHEMES.values():
        engine = Engine(parameters(scheme, scratch), bytes(range(32)))
        for form in FORMS:
            parts = engine.encrypt(values, form)
            seeds = [[parts.pop(0)]] if form == "seeded" else []
            words = np.frombuffer(b"".join(parts), dtype="<u8").reshape(polynomials(form), 1, DEGREE)
            if not np.array_equal(engine.open(seeds, words, 3), values):
                raise WireError("This build of TenSEAL does not open what it encrypted.", expected="tenseal 0.3.18")
    return []


def main() -> None:
    """Answer until standard input ends."""
    requests = sys.stdin.buffer
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answering = Answering()
    try:
        while head := requests.read(REQUEST.size):
            body = fill(requests, REQUEST.unpack(head)[-1])
            try:
                parts = answering.answer(head, body)
                _write(answers, b"+", parts)
            except SplitflError as error:
                _write(answers, b"-", [error.problem.encode()])
            except (ValueError, RuntimeError, IndexError, MemoryError) as error:  # what SEAL's exceptions turn into
                _write(answers, b"-", [f"The library refused it ({type(error).__name__}).".encode()])
    finally:
        answering.close()


def _write(answers: IO[bytes], status: bytes, parts: Sequence[bytes]) -> None:
    answers.write(ANSWER.pack(status, sum(map(len, parts))))
    for part in parts:
        answers.write(part)
    answers.flush()


if __name__ == "__main__":
    main()
