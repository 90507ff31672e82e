"""Signed and sealed blobs: right for one sender, one receiver and one round."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.aggregation.identity import identity_of, signing_key
from splitfl.aggregation.sealed import (
    OVERHEAD,
    agreed_key,
    digest,
    open_sealed,
    seal,
    seal_for,
    signed,
    terms_digest,
    unseal,
    unsigned,
)
from splitfl.errors import WireError
from tests.aggregation.rounds_in_memory import identities, pairs, terms_of

BINDING = bytes(range(32))


def name(place):
    return pairs()[place].public.decode()


def test_every_part_of_the_terms_counts():
    terms = terms_of(3)
    changes = [
        {"federation": "1" * 32}, {"round": 1}, {"attempt": 1}, {"length": 21}, {"clip": 0.25}, {"max_weight": 1.0},
        {"layout": "other"}, {"parties": terms.parties[:2]},
    ]  # fmt: skip
    digests = {terms_digest(dataclasses.replace(terms, **change)) for change in changes}
    digests |= {
        terms_digest(terms),
        terms_digest(terms, b""),
        terms_digest(terms, b"a"),
        terms_digest(terms, b"", b"a"),
    }
    assert len(digests) == len(changes) + 4
    assert terms_digest(terms) == terms_digest(terms_of(3))


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_no_two_lists_are_hashed_alike(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)


def test_a_signature_is_for_one_purpose_round_party_and_body():
    key = identity_of(identities(1), name(0))
    blob = signed(signing_key(pairs()[0]), b"advertise", BINDING, name(0), b"body")
    assert bytes(unsigned(key, blob, 4, b"advertise", BINDING, name(0))) == b"body"
    wrong = (
        (key, blob, 4, b"reveal", BINDING, name(0)),
        (key, blob, 4, b"advertise", bytes(32), name(0)),
        (key, blob, 4, b"advertise", BINDING, name(1)),
        (identity_of(identities(2), name(1)), blob, 4, b"advertise", BINDING, name(0)),
        (key, b"bodY" + blob[4:], 4, b"advertise", BINDING, name(0)),
        (key, blob, 5, b"advertise", BINDING, name(0)),
        (key, b"", 4, b"advertise", BINDING, name(0)),
        (None, blob[:-1], 4, b"advertise", BINDING, name(0)),
    )
    for arguments in wrong:
        with pytest.raises(WireError):
            unsigned(*arguments)


def test_sealed_is_sealed():
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    key = agreed_key(one, two.public_key().public_bytes_raw(), b"info")
    assert key == agreed_key(two, one.public_key().public_bytes_raw(), b"info")
    assert key != agreed_key(two, one.public_key().public_bytes_raw(), b"other")
    blob = seal(key, b"content", b"bound")
    assert len(blob) == len(b"content") + OVERHEAD
    assert unseal(key, blob, b"bound", "It") == b"content"
    assert seal(key, b"content", b"bound") != blob
    for arguments in (
        (bytes(32), blob, b"bound"),
        (key, blob, b"other"),
        (key, blob[:-1], b"bound"),
        (key, b"", b"bound"),
    ):
        with pytest.raises(WireError, match="It cannot be opened"):
            unseal(*arguments, "It")
    with pytest.raises(WireError, match="not one"):
        agreed_key(one, bytes(32), b"info")


@settings(max_examples=20, deadline=None)
@given(content=st.binary(max_size=300), readers=st.sets(st.integers(0, 9), min_size=1))
def test_who_it_is_for_can_open_it_and_nobody_else(content, readers):
    known = identities(11)
    blob = seal_for([name(place) for place in readers], content, pairs()[10], b"state", BINDING)
    for place in range(10):
        arguments = (blob, pairs()[place], name(10), known[name(10)], b"state", BINDING)
        if place in readers:
            assert open_sealed(*arguments) == content
        else:
            with pytest.raises(WireError, match="not for this party"):
                open_sealed(*arguments)


def test_changed_sealed_files_are_refused():
    known = identities(3)
    blob = seal_for([name(0), name(1)], b"content", pairs()[2], b"state", BINDING)
    rng = np.random.default_rng(0)
    wrong = [b"", blob[:-1], blob[:50], blob[:64], blob + b"\0"]
    for place in range(0, len(blob), 3):
        changed = bytearray(blob)
        changed[place] ^= 1 << int(rng.integers(8))
        wrong.append(bytes(changed))
    for candidate in wrong:
        with pytest.raises(WireError):
            open_sealed(candidate, pairs()[0], name(2), known[name(2)], b"state", BINDING)
    for sender, purpose, binding in ((1, b"state", BINDING), (2, b"other", BINDING), (2, b"state", bytes(32))):
        with pytest.raises(WireError):
            open_sealed(blob, pairs()[0], name(sender), known[name(sender)], purpose, binding)


@pytest.mark.parametrize("count", [0, 1, 2**12, 2**12 + 1, 2**32 - 1])
def test_a_signed_file_with_a_false_count_is_refused(count):
    """Also a party that is trusted to sign must not make another one read beyond the end."""
    body = bytes(range(32)) + count.to_bytes(4, "little") + bytes(10)
    blob = signed(signing_key(pairs()[1]), b"sealed state", BINDING, name(1), body)
    with pytest.raises(WireError):
        open_sealed(blob, pairs()[0], name(1), identities(2)[name(1)], b"state", BINDING)
