"""SEAL objects to and from plain arrays; runs in the child process of `he_child` and in the audit, nowhere else.

`tenseal.sealapi` reads and writes objects only as files in SEAL's own format. A file in memory (Linux) or in a private
folder stands in between. What SEAL reads is always written here, from words that have been checked: no byte of a header
ever comes from a peer. Layout of the format, all little-endian (SEAL 4, ``serialization.h``, ``ciphertext.h``,
``plaintext.h``, ``dynarray.h``, ``randomgen.h``):

    any object   magic 5E A1, 16, version 2 bytes, compression, 2 zero bytes, length of all uint64, then the object
    plaintext    parms id 32, coefficients uint64, scale float64, array
    ciphertext   parms id 32, is NTT 1, polynomials uint64, degree uint64, primes uint64, scale float64, correction
                 uint64, array; a seeded one has c0 alone in it, and the generator's state behind it
    array        an object: count uint64, words
    generator    an object: kind 1 (1 is BLAKE2Xb), seed 64
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal
import zstandard

from splitfl.aggregation.lattice import DEGREE, MODULUS_BITS, PLAIN_MODULUS, SEED_BYTES, Scheme, Words
from splitfl.errors import InternalError

CKKS_SCALE = 2.0**50
_HEADER = struct.Struct("<2sBBBBHQ")
_PLAIN = struct.Struct("<4QQd")
_CIPHER = struct.Struct("<4QBQQQdQ")
_COUNT = struct.Struct("<Q")
_LARGEST_OBJECT = 1 << 20  # a key, the largest, has 262 kB


class Scratch:
    """Where SEAL's objects pass through: in memory on Linux, elsewhere in a folder of its own that `close` removes."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("splitfl", os.MFD_CLOEXEC)
            self._path = f"/proc/self/fd/{self._file}"
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="splitfl-"))  # mode 0700
            self._path = str(self._folder / "object")
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._version = (0, 0)
        self._unpack = zstandard.ZstdDecompressor()
        self.save(seal.Plaintext("1"))  # tells the version that this build writes

    def close(self) -> None:
        """Overwrite and remove what is left."""
        size = os.fstat(self._file).st_size
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, bytes(size))
        os.close(self._file)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def save(self, thing: Any) -> bytes:
        """`thing` in SEAL's format, unpacked, without the header.

        Raises:
            InternalError: this build of SEAL writes something else than described above.
        """
        thing.save(self._path)
        os.lseek(self._file, 0, os.SEEK_SET)
        blob = os.read(self._file, _LARGEST_OBJECT)
        magic, header_size, major, minor, packing, _, size = _HEADER.unpack_from(blob)
        if (
            magic != b"\x5e\xa1"
            or header_size != _HEADER.size
            or major != 4
            or size != len(blob)
            or packing not in (0, 2)
        ):
            raise InternalError(
                "This build of TenSEAL keeps its objects in another format than the one that splitfl reads.",
                expected="tenseal 0.3.16 to 0.3.18 (SEAL 4)",
            )
        self._version = (major, minor)
        body = blob[_HEADER.size :]
        return self._unpack.decompress(body, max_output_size=_LARGEST_OBJECT) if packing == 2 else body

    def load(self, into: Any, context: Any, body: bytes) -> Any:
        """Have SEAL read `into` from an object's body; returns `into`."""
        blob = self.framed(body)
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, blob)
        into.load(context, self._path)
        return into

    def framed(self, body: bytes) -> bytes:
        """An object's body behind a header."""
        major, minor = self._version
        return _HEADER.pack(b"\x5e\xa1", _HEADER.size, major, minor, 0, 0, _HEADER.size + len(body)) + body

    def array(self, *parts: npt.NDArray[np.uint64]) -> bytes:
        """The words of all `parts` as an array object."""
        count = sum(part.size for part in parts)
        return self.framed(_COUNT.pack(count) + b"".join(part.astype("<u8", copy=False).tobytes() for part in parts))


@dataclass(frozen=True)
class Parameters:
    """What SEAL needs to know of one scheme."""

    scheme: Scheme
    context: Any
    scratch: Scratch

    @property
    def data_id(self) -> list[int]:
        """SEAL's name for the level that fresh ciphertexts have."""
        return list(self.context.first_parms_id())

    @property
    def scale(self) -> float:
        """Of a fresh ciphertext."""
        return CKKS_SCALE if self.scheme.name == "ckks" else 1.0

    def plaintext(self, words: npt.NDArray[np.uint64]) -> Any:
        """A BFV plaintext with these coefficients."""
        return self._from_words(seal.Plaintext(), words, [0] * 4, 1.0)

    def encoded(self, words: npt.NDArray[np.uint64], scale: float) -> Any:
        """A CKKS plaintext with these words, in NTT form."""
        return self._from_words(seal.Plaintext(), words, self.data_id, scale)

    def coefficients(self, plaintext: Any) -> Words:
        """All DEGREE words of a plaintext; SEAL leaves out zeros at the end."""
        found = np.frombuffer(
            self.scratch.save(plaintext), dtype="<u8", offset=_PLAIN.size + _HEADER.size + _COUNT.size
        )
        words = np.zeros(DEGREE, dtype=np.uint64)
        words[: found.size] = found
        return words

    def secret_key(self, words: npt.NDArray[np.uint64]) -> Any:
        """The secret key with these 2 x DEGREE words: the polynomial in NTT form modulo both primes."""
        return self._from_words(seal.SecretKey(), words, list(self.context.key_parms_id()), 1.0)

    def key_words(self, key: Any) -> Words:
        """Words of a secret key: modulo the data prime, then modulo the other; NTT form."""
        return np.frombuffer(self.scratch.save(key), dtype="<u8", offset=_PLAIN.size + _HEADER.size + _COUNT.size)

    def ciphertext(self, c0: npt.NDArray[np.uint64], c1: npt.NDArray[np.uint64] | bytes) -> Any:
        """A ciphertext.

        Args:
            c0: [DEGREE].
            c1: [DEGREE], or a seed of 64 bytes that SEAL expands to it.
        """
        ntt = self.scheme.name == "ckks"
        head = _CIPHER.pack(*self.data_id, ntt, 2, DEGREE, 1, self.scale, 1)
        if isinstance(c1, bytes):
            body = head + self.scratch.array(c0) + self.scratch.framed(b"\x01" + c1)
        else:
            body = head + self.scratch.array(c0, c1)
        return self.scratch.load(seal.Ciphertext(), self.context, body)

    def polynomials(self, ciphertext: Any) -> Words:
        """Both polynomials of a ciphertext, [2, DEGREE]."""
        words = np.frombuffer(self._cipher_array(ciphertext), dtype="<u8")
        return words.reshape(2, DEGREE)

    def seeded(self, serialisable: Any) -> tuple[Words, bytes]:
        """c0 [DEGREE] and the seed of c1, of what `Encryptor.encrypt_symmetric` returned."""
        rest = self._cipher_array(serialisable)
        words = np.frombuffer(rest, dtype="<u8", count=DEGREE)
        tail = rest[DEGREE * 8 :]
        if len(tail) != _HEADER.size + 1 + SEED_BYTES or tail[_HEADER.size] != 1:
            raise InternalError(
                "This build of TenSEAL does not make seeded ciphertexts as splitfl expects.",
                expected="the seed of a BLAKE2Xb generator",
            )
        return words, tail[-SEED_BYTES:]

    def _cipher_array(self, thing: Any) -> bytes:
        return self.scratch.save(thing)[_CIPHER.size + _HEADER.size + _COUNT.size :]

    def _from_words(self, into: Any, words: npt.NDArray[np.uint64], parms_id: list[int], scale: float) -> Any:
        head = _PLAIN.pack(*parms_id, words.size, scale)
        return self.scratch.load(into, self.context, head + self.scratch.array(words))


def parameters(scheme: Scheme, scratch: Scratch) -> Parameters:
    """The one set of parameters that a scheme has here: 8192 [60, 60], 128 bit classical security or more."""
    kind = seal.SCHEME_TYPE.BFV if scheme.name == "bfv" else seal.SCHEME_TYPE.CKKS
    chosen = seal.EncryptionParameters(kind)
    chosen.set_poly_modulus_degree(DEGREE)
    chosen.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(MODULUS_BITS)))
    if scheme.name == "bfv":
        chosen.set_plain_modulus(PLAIN_MODULUS)
    context = seal.SEALContext(chosen, True, seal.SEC_LEVEL_TYPE.TC128)
    return Parameters(scheme, context, scratch)
