"""A party's signing identity: an Ed25519 key that follows from its CURVE secret, so there is no second secret to keep.

The public half stands in NAME.key, in the certificate's metadata, which ZeroMQ's own reader skips:

    metadata
        signing-key = "64 hexadecimal digits"
        signing-proof = "128 hexadecimal digits"

The proof is a signature by that key under the CURVE public key: nobody can put another party's signing key into his own
file. It does not say that the file is whose you think it is: whoever can replace the file can replace both keys. What
says so is the fingerprint, compared over another road (`splitfl keys show` prints one for each key).
"""

from __future__ import annotations

import base64
import hashlib
import re

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitfl.errors import KeyFileError

_SEED = b"splitfl signing identity 1"
_PROOF = b"splitfl signing proof 1\0"
_LINE = re.compile(r'\s*signing-(key|proof)\s*=\s*"([0-9a-f]*)"\s*')


def derive(secret: bytes) -> Ed25519PrivateKey:
    """The signing key that belongs to a CURVE secret key of 32 bytes (HKDF-SHA256, RFC 5869, own info string)."""
    seed = HKDF(algorithm=SHA256(), length=32, salt=None, info=_SEED).derive(secret)
    return Ed25519PrivateKey.from_private_bytes(seed)


def metadata_lines(public: bytes, secret: bytes) -> list[str]:
    """The lines of a public file that give the signing key and its proof, for a CURVE pair of 32 bytes each."""
    key = derive(secret)
    return _lines(key.public_key().public_bytes_raw(), key.sign(_PROOF + public))


def checked_lines(text: str, public: bytes) -> list[str]:
    """The signing lines of a public file, made anew, or none if it has none.

    Raises:
        KeyFileError: they are malformed, or belong to another CURVE key.
    """
    found = _find(text)
    return _lines(*_verified(found, public)) if found else []


def public_half(text: str, public: bytes) -> Ed25519PublicKey | None:
    """The signing key in the text of a public file, its proof checked against the file's CURVE key; None if none.

    Raises:
        KeyFileError: it is malformed, or belongs to another CURVE key.
    """
    found = _find(text)
    return Ed25519PublicKey.from_public_bytes(_verified(found, public)[0]) if found else None


def signing_fingerprint(key: Ed25519PublicKey) -> str:
    """A short form, to be compared by eye; written like that of a CURVE key, and never equal to one."""
    digest = hashlib.sha256(b"ed25519\0" + key.public_bytes_raw()).digest()[:20]
    text = base64.b32encode(digest).decode("ascii")
    return "SHA256:" + "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def _find(text: str) -> dict[str, str]:
    return {match[1]: match[2] for line in text.splitlines() if (match := _LINE.fullmatch(line))}


def _verified(found: dict[str, str], public: bytes) -> tuple[bytes, bytes]:
    try:
        key, proof = bytes.fromhex(found["key"]), bytes.fromhex(found["proof"])
        Ed25519PublicKey.from_public_bytes(key).verify(proof, _PROOF + public)
    except (KeyError, ValueError, InvalidSignature):
        raise KeyFileError(
            "The signing key in a key file does not belong to its CURVE key.",
            expected="the lines signing-key and signing-proof as `splitfl keys new` writes them",
            hint="ask its owner for the file that `splitfl keys identity NAME.key_secret` writes",
        ) from None
    return key, proof


def _lines(key: bytes, proof: bytes) -> list[str]:
    return [f'    signing-key = "{key.hex()}"', f'    signing-proof = "{proof.hex()}"']
