"""Blobs between the parties of a round: signed, sealed, and bound to that round.

    signed   Ed25519 by the sender's identity under (purpose, terms of the round, sender, SHA-256 of the body)
    sealed   AES-256-GCM under HKDF-SHA256 of an X25519 agreement; the terms, sender and receiver go into the key

A blob from another round, attempt, federation, stage or sender does therefore not verify. Sizes are checked before
anything is hashed or parsed.

`seal_for` needs no agreement beforehand: it seals to CURVE public keys, which are X25519 keys, so that a party that was
not in the round can read it with its own key file. Whoever steals that file later reads what was sealed so.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitfl.aggregation.identity import short, signing_key
from splitfl.aggregation.sums import RoundTerms
from splitfl.errors import KeyFileError, UsageError, WireError
from splitfl.wire.keys import KeyPair, z85_decode

Buffer = bytes | bytearray | memoryview

SIGNATURE = 64
KEY = 32
_NONCE, _TAG = 12, 16
OVERHEAD = _NONCE + _TAG
"""Bytes by which a sealed blob is longer than its content."""
_MAX_PARTIES = 1 << 12
_SLOT = KEY + OVERHEAD


# ---- the round


def check_terms(terms: RoundTerms) -> None:
    """Refuse terms that cannot be those of a round.

    Raises:
        UsageError: parties not sorted, doubled or malformed; a figure out of range.
    """
    figures = (terms.clip, terms.max_weight)
    if terms.length < 1 or not all(0 < figure < math.inf for figure in figures):
        raise UsageError(
            f"A round of {terms.length} values with clip {terms.clip:g} and weights up to {terms.max_weight:g} "
            "cannot be summed.",
            expected="at least one value, and finite limits above 0",
        )
    if not 0 <= terms.round < 1 << 63 or not 0 <= terms.attempt < 1 << 63:
        raise UsageError(f"Round {terms.round}, attempt {terms.attempt} cannot be.", expected="numbers from 0")
    if not 1 <= len(terms.parties) <= _MAX_PARTIES or list(terms.parties) != sorted(set(terms.parties)):
        raise UsageError(
            f"The {len(terms.parties)} parties of a round are not a sorted list of different ones.",
            expected=f"1 to {_MAX_PARTIES} public keys, sorted, each once",
        )
    try:
        for party in terms.parties:
            z85_decode(party.encode("ascii"))
    except (KeyFileError, UnicodeEncodeError):
        raise UsageError("A party of the round has no CURVE key.", expected="40 characters of Z85") from None


def terms_digest(terms: RoundTerms, *more: bytes) -> bytes:
    """32 bytes that stand for the terms and for whatever else of a way of summing all must agree on."""
    return digest(
        b"splitfl round terms 1",
        terms.federation.encode("utf-8"),
        struct.pack("<QQQdd", terms.round, terms.attempt, terms.length, terms.clip, terms.max_weight),
        terms.layout.encode("utf-8"),
        *(party.encode("ascii") for party in terms.parties),
        b"",
        *more,
    )


def digest(*parts: Buffer) -> bytes:
    """BLAKE2b-256 of the parts, each with its length, so that no two lists of parts are hashed alike."""
    state = hashlib.blake2b(digest_size=32)
    for part in parts:
        state.update(struct.pack("<Q", len(part)))
        state.update(part)
    return state.digest()


# ---- signed


def sign(identity: Ed25519PrivateKey, purpose: bytes, binding: bytes, party: str, body_hash: bytes) -> bytes:
    """64 bytes: `party` says a body with this SHA-256, for `purpose`, in the round that `binding` stands for."""
    return identity.sign(_statement(purpose, binding, party, body_hash))


def check_signature(
    key: Ed25519PublicKey, signature: Buffer, purpose: bytes, binding: bytes, party: str, body_hash: bytes
) -> None:
    """Refuse a signature that is not `party`'s under exactly this.

    Raises:
        WireError: it is not.
    """
    try:
        key.verify(bytes(signature), _statement(purpose, binding, party, body_hash))
    except InvalidSignature:
        raise WireError(
            f"What party {short(party)} sent ({purpose.decode('ascii')}) does not carry its signature.",
            expected="a signature by its pinned identity under the terms of this round and attempt",
            hint="compare the fingerprints of its key file on both sides",
        ) from None


def signed(identity: Ed25519PrivateKey, purpose: bytes, binding: bytes, party: str, body: bytes) -> bytes:
    """`body` followed by its signature."""
    return body + sign(identity, purpose, binding, party, hashlib.sha256(body).digest())


def unsigned(
    key: Ed25519PublicKey | None, blob: bytes, length: int, purpose: bytes, binding: bytes, party: str
) -> memoryview:
    """The body of a signed blob.

    Args:
        key: of the party; None leaves the signature unchecked, where the channel vouches for the sender.
        length: of the body, which is checked first.

    Raises:
        WireError: another length, or not signed by this party for this.
    """
    check_length(blob, length + SIGNATURE, purpose.decode("ascii"), party)
    body = memoryview(blob)[:length]
    if key is not None:
        check_signature(key, blob[length:], purpose, binding, party, hashlib.sha256(body).digest())
    return body


def check_length(blob: Buffer, length: int, what: str, party: str) -> None:
    """Refuse a blob of another length than `length` bytes.

    Raises:
        WireError: it has another.
    """
    if len(blob) != length:
        raise WireError(
            f"Party {short(party)} sent {len(blob)} bytes ({what}).", expected=f"{length} bytes under these terms"
        )


def _statement(purpose: bytes, binding: bytes, party: str, body_hash: bytes) -> bytes:
    return digest(b"splitfl signed blob 1", purpose, binding, party.encode("ascii"), body_hash)


# ---- sealed


def agreed_key(private: X25519PrivateKey, peer: Buffer, info: bytes, party: str = "") -> bytes:
    """32 bytes that only the two holders of these X25519 keys can compute.

    Args:
        peer: the other public key, 32 bytes.
        info: everything that the key is for; both sides must give the same.
        party: whose key it is, for the error.

    Raises:
        WireError: `peer` is no key that an honest party would send.
    """
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(bytes(peer)))
    except ValueError:
        raise WireError(
            f"The X25519 key of party {short(party)} is not one.", expected="32 bytes that are not of low order"
        ) from None
    return HKDF(algorithm=SHA256(), length=KEY, salt=None, info=info).derive(shared)


def seal(key: bytes, content: bytes, bound: bytes) -> bytes:
    """`content`, readable and unchanged only under `key` and with the same `bound`; `OVERHEAD` bytes longer."""
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, content, bound)


def unseal(key: bytes, blob: Buffer, bound: bytes, what: str) -> bytes:
    """What `seal` sealed.

    Args:
        what: names it in the error.

    Raises:
        WireError: another key, another `bound`, or changed on the way.
    """
    held = memoryview(blob)
    if len(held) >= OVERHEAD:
        try:
            return AESGCM(key).decrypt(held[:_NONCE], held[_NONCE:], bound)
        except InvalidTag:
            pass
    raise WireError(
        f"{what} cannot be opened.",
        expected="what was sealed for this party, in this round and attempt, unchanged",
        hint="compare the fingerprints of the key files on both sides",
    )


# ---- sealed to key files


def seal_for(recipients: Sequence[str], content: bytes, sender: KeyPair, purpose: bytes, binding: bytes) -> bytes:
    """`content`, readable to the holders of these CURVE keys alone, signed by the sender.

    The layout: ephemeral X25519 key, number of slots (u32), one sealed content key a recipient, sealed content,
    signature. Slots carry no names; they are in the order of the sorted keys.

    Args:
        recipients: public CURVE keys (Z85), each once.
        purpose: ASCII, what the content is for.
        binding: 32 bytes that it is bound to, such as a digest of federation and round.
    """
    ephemeral, inner = X25519PrivateKey.generate(), os.urandom(KEY)
    public = ephemeral.public_key().public_bytes_raw()
    head = digest(b"splitfl sealed 1", purpose, binding, sender.public, public)
    slots = []
    for recipient in sorted(recipients):
        raw = z85_decode(recipient.encode("ascii"))
        slots.append(seal(agreed_key(ephemeral, raw, head + raw), inner, head))
    body = public + struct.pack("<I", len(slots)) + b"".join(slots) + seal(inner, content, head)
    return signed(signing_key(sender), b"sealed " + purpose, binding, sender.public.decode("ascii"), body)


def open_sealed(
    blob: bytes, keys: KeyPair, sender: str, identity: Ed25519PublicKey, purpose: bytes, binding: bytes
) -> bytes:
    """What `sender` sealed for the holder of `keys`, among others.

    Raises:
        WireError: not signed by `sender` for this purpose and binding, or not sealed for this party.
    """
    body = unsigned(identity, blob, len(blob) - SIGNATURE, b"sealed " + purpose, binding, sender)
    what = f"What party {short(sender)} sealed"
    count = int.from_bytes(body[KEY : KEY + 4], "little")
    start, end = KEY + 4, KEY + 4 + count * _SLOT
    if count > _MAX_PARTIES or end + OVERHEAD > len(body):
        raise WireError(f"{what} is cut short.", expected=f"{end + OVERHEAD} bytes or more")
    head = digest(b"splitfl sealed 1", purpose, binding, sender.encode("ascii"), body[:KEY])
    private = X25519PrivateKey.from_private_bytes(z85_decode(keys.secret))
    wrapping = agreed_key(private, body[:KEY], head + z85_decode(keys.public))
    for place in range(start, end, _SLOT):
        try:
            inner = unseal(wrapping, body[place : place + _SLOT], head, what)
        except WireError:
            continue
        return unseal(inner, body[end:], head, what)
    raise WireError(f"{what} is not for this party.", hint="its sender must have this party's key file")
