"""Who signs in a round: the identities that parties pin of each other, beside the coordinator and against it.

The coordinator hands round everything that the parties of a masked or encrypted sum say to each other. What keeps it
from speaking in their names is that each of them knows the signing keys of the others beforehand, from files that the
coordinator did not make: a folder of NAME.key files, like an owner's allow-list (`splitfl keys allow NAME.key --parties
peers/` copies one there), given to the party as ``--peers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from splitfl.errors import KeyFileError, WireError
from splitfl.wire.keys import KeyPair, load_public, load_signing, z85_decode
from splitfl.wire.signing import derive

Identities = Mapping[str, Ed25519PublicKey]
"""Signing keys by public CURVE key (Z85)."""


def signing_key(keys: KeyPair) -> Ed25519PrivateKey:
    """The party's signing key; always the same one for the same CURVE pair."""
    return derive(z85_decode(keys.secret))


def load_identities(folder: Path) -> Identities:
    """The signing keys of all NAME.key files in `folder`, by public CURVE key (Z85).

    Raises:
        KeyFileError: no such folder or no file in it; a file that cannot be used, has no signing key, or holds a key
            that another file holds.
    """
    paths = sorted(path for path in folder.glob("*.key") if not path.name.startswith("."))
    if not paths:
        raise KeyFileError(
            f"There is no key file in {folder}.",
            expected="NAME.key of every party whose updates may be summed with this one's",
            hint=f"splitfl keys allow NAME.key --parties {folder}",
        )
    found: dict[str, Ed25519PublicKey] = {}
    for path in paths:
        public = load_public(path).decode("ascii")
        if public in found:
            raise KeyFileError(f"{path} holds the same key as another file in {folder}.")
        found[public] = load_signing(path)
    return MappingProxyType(found)


def identity_of(identities: Identities, party: str) -> Ed25519PublicKey:
    """The pinned signing key of `party`.

    Raises:
        WireError: it is not pinned.
    """
    key = identities.get(party)
    if key is None:
        raise WireError(
            f"The identity of party {short(party)} is not known here.",
            expected="the public key file of every party of the round",
            hint="ask that party for its NAME.key, compare fingerprints, and add it with: splitfl keys allow",
        )
    return key


def short(party: str) -> str:
    """A party's public CURVE key, cut to what tells parties apart in a message."""
    return "".join(character if character.isprintable() else "?" for character in party[:8])
