"""How the parties of a round come to one secret through a coordinator that cannot read it.

    advertise   an X25519 key made for this attempt, signed by the party's pinned identity
    share       to each other party: 32 random bytes, sealed under the agreement of the two keys, and signed
    afterwards  secret = HKDF-SHA256(the random bytes of all who shared, who they are, the terms of the round)

Every party contributes, so the secret is as good as the best generator among them, and it does not matter who drops out
once its share is delivered: nobody leads. Parties that were told of different sets arrive at different secrets, and
`GroupSecret.name` differs, which the coordinator sees at the first update.

Not forward secret against a party of the round, who has the secret anyway; the keys themselves are made for one attempt
and forgotten with this object.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitfl.aggregation.identity import Identities, identity_of, short, signing_key
from splitfl.aggregation.sealed import (
    KEY,
    OVERHEAD,
    SIGNATURE,
    agreed_key,
    check_length,
    digest,
    seal,
    signed,
    unseal,
    unsigned,
)
from splitfl.errors import WireError
from splitfl.wire.keys import KeyPair

NAME_BYTES = 16
ADVERT_BYTES = KEY + SIGNATURE
SHARE_BYTES = KEY + OVERHEAD + SIGNATURE


@dataclass(frozen=True)
class GroupSecret:
    """What the parties of one attempt have in common."""

    name: bytes
    """`NAME_BYTES` that may be known; two secrets have two names."""
    key: bytes = field(repr=False)
    """The secret key of the ciphertexts follows from it; 32 bytes."""
    tags: bytes = field(repr=False)
    """What `tags` needs; 32 bytes."""


class KeyAgreement:
    """One party's part in one attempt.

    Args:
        binding: 32 bytes that stand for the round, the attempt and the parameters.
        keys: of this party.
        identities: signing keys of the parties of the round, by public key.
        parties: who may take part.
    """

    def __init__(self, binding: bytes, keys: KeyPair, identities: Identities, parties: tuple[str, ...]) -> None:
        self._binding, self._identities, self._parties = binding, identities, parties
        self._party = keys.public.decode("ascii")
        self._identity = signing_key(keys)
        self._private = X25519PrivateKey.generate()
        self._part = secrets.token_bytes(KEY)
        self._advert = signed(
            self._identity, b"advert", binding, self._party, self._private.public_key().public_bytes_raw()
        )
        self._shares: dict[str, bytes] = {}

    def advertise(self) -> bytes:
        """This party's key for the attempt, signed; `ADVERT_BYTES`."""
        return self._advert

    def share(self, adverts: Mapping[str, bytes]) -> dict[str, bytes]:
        """This party's part of the secret, sealed for each other party; `SHARE_BYTES` each. The same at every call.

        Raises:
            WireError: an advert is not of a party of the round, or not signed by it.
        """
        public = self._read(adverts)
        for peer, key in public.items():
            if peer != self._party and peer not in self._shares:
                self._shares[peer] = self._seal(peer, key)
        return {peer: self._shares[peer] for peer in public if peer != self._party}

    def secret(self, adverts: Mapping[str, bytes], shares: Mapping[str, bytes]) -> GroupSecret:
        """The secret of those whose shares came, and of this party.

        Raises:
            WireError: an advert or a share is not what its party sent for this attempt.
        """
        public = self._read(adverts)
        parts = {self._party: self._part}
        for peer, blob in shares.items():
            if peer == self._party or peer not in public:
                raise WireError(f"A share came from {short(peer)}.", expected="another party that has advertised a key")
            parts[peer] = self._unseal(peer, public[peer], blob)
        members = sorted(parts)
        info = digest(b"splitfl group secret 1", self._binding, *(member.encode("ascii") for member in members))
        root = HKDF(algorithm=SHA256(), length=KEY, salt=None, info=info).derive(b"".join(parts[m] for m in members))
        name, key, tags = (hmac.digest(root, purpose, "sha256") for purpose in (b"name", b"key", b"tags"))
        return GroupSecret(name=name[:NAME_BYTES], key=key, tags=tags)

    def _read(self, adverts: Mapping[str, bytes]) -> dict[str, bytes]:
        if adverts.get(self._party) != self._advert:
            raise WireError("The list of keys does not hold the one that this party sent.", expected="it, unchanged")
        public = {}
        for peer, blob in adverts.items():
            if peer not in self._parties:
                raise WireError(f"A key came from {short(peer)}.", expected="a party of the round")
            # Its own advert has just been compared: an identity for oneself need not be pinned.
            identity = None if peer == self._party else identity_of(self._identities, peer)
            public[peer] = bytes(unsigned(identity, blob, KEY, b"advert", self._binding, peer))
        return public

    def _seal(self, peer: str, public: bytes) -> bytes:
        bound = self._bound(self._party, peer)
        body = seal(agreed_key(self._private, public, bound), self._part, bound)
        return signed(self._identity, b"share", bound, self._party, body)

    def _unseal(self, peer: str, public: bytes, blob: bytes) -> bytes:
        check_length(blob, SHARE_BYTES, "share", peer)
        bound = self._bound(peer, self._party)
        body = unsigned(identity_of(self._identities, peer), blob, KEY + OVERHEAD, b"share", bound, peer)
        return unseal(agreed_key(self._private, public, bound), body, bound, f"The share of party {short(peer)}")

    def _bound(self, sender: str, receiver: str) -> bytes:
        return digest(b"splitfl group share 1", self._binding, sender.encode("ascii"), receiver.encode("ascii"))
