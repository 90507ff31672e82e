import os

import numpy as np
import pytest

pytest.importorskip("tenseal")

from splitfl.aggregation.he_child import Engine, key_words
from splitfl.aggregation.lattice import CKKS, DATA_PRIME, DEGREE
from splitfl.aggregation.seal_objects import Scratch, parameters
from splitfl.audit.attacks import ckks_key
from splitfl.audit.attacks.ckks_key import Published, explained, main, recover, scene


def test_two_raw_sums_give_the_whole_key():
    outcome = scene(raw=True)
    assert outcome.words == DEGREE
    assert outcome.explains == DEGREE // 2
    assert outcome.reads is not None
    assert outcome.reads < 1e-9  # an update that nobody opened, read


def test_what_splitfl_publishes_gives_nothing():
    outcome = scene(raw=False)
    assert outcome.words == 0
    assert outcome.explains == 0
    assert outcome.reads is None


def test_the_rounding_alone_makes_the_difference():
    """The same ciphertexts and the same key: published raw they give the key away, moved to the grid they do not."""
    scratch = Scratch()
    try:
        known, secret = parameters(CKKS, scratch), os.urandom(32)
        engine, true_key = Engine(known, secret), key_words(scratch, secret)[:DEGREE]
        values = np.random.default_rng(0).integers(-(1 << 20), 1 << 20, 3 * CKKS.slots).astype(np.int32)
        words = ckks_key._ciphertexts(engine, values)
        for numbers, right in (
            (ckks_key._raw(engine, words), True),
            (ckks_key._as_published(engine, words, values.size), False),
        ):
            sums = [Published(words[:, block], numbers[block]) for block in range(3)]
            key = recover(known, sums[0], sums[1])
            assert np.array_equal(key, true_key) is right
            assert explained(known, key, sums[2]) == (DEGREE // 2 if right else 0)
    finally:
        scratch.close()


def test_what_is_published_holds_no_noise():
    """Two encryptions of the same update, opened: raw they differ, as splitfl opens them they are equal to the bit."""
    scratch = Scratch()
    try:
        engine = Engine(parameters(CKKS, scratch), os.urandom(32))
        values = np.random.default_rng(1).integers(-(1 << 20), 1 << 20, CKKS.slots).astype(np.int32)
        one, other = (ckks_key._ciphertexts(engine, values) for _ in range(2))
        assert not np.array_equal(ckks_key._raw(engine, one)[0], ckks_key._raw(engine, other)[0])
        for words in (one, other):
            assert np.array_equal(ckks_key._as_published(engine, words, values.size)[0] * CKKS.finest, values)
    finally:
        scratch.close()


def test_inverses():
    values = [1, 2, DATA_PRIME - 1, 123456789]
    assert [v * w % DATA_PRIME for v, w in zip(values, ckks_key._inverses(values), strict=True)] == [1] * 4


def test_it_runs_as_a_program(capsys):
    main()
    raw, reading, ours = capsys.readouterr().out.splitlines()
    assert f"{DEGREE} of {DEGREE} words" in raw
    assert "never opened" in reading
    assert f"    0 of {DEGREE} words" in ours
