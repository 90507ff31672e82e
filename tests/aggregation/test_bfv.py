"""Encrypted sums: exactness, sizes, dropouts, and the parts that they are made of."""

import hashlib
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tenseal")

import tenseal.sealapi as seal

from splitfl.aggregation.encrypted import Shape
from splitfl.aggregation.grid import EXTRA
from splitfl.aggregation.he_child import key_words
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.lattice import (
    BFV,
    DATA_PRIME,
    DEGREE,
    MODULUS_BITS,
    PLAIN_MODULUS,
    SCHEMES,
    RunningSum,
    read_words,
    seeds_size,
    words_size,
)
from splitfl.aggregation.seal_objects import Scratch
from splitfl.aggregation.sealed import SIGNATURE
from splitfl.aggregation.tags import LIMBS, fits, tag
from splitfl.errors import WireError
from tests.aggregation.encrypted_rounds import KINDS, Round, key_pairs, plain_mean, terms_of, updates_of

SECRET = bytes(range(32))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        started.check()
        yield started


@pytest.fixture(scope="module")
def pairs():
    return key_pairs(4)


# ---- the sum


@pytest.mark.parametrize("form", ["seeded", "public"])
def test_whole_numbers_add_up_exactly(worker, form):
    parties, count = 10, 3 * DEGREE + 5
    most = BFV.largest // parties
    rng = np.random.default_rng(0)
    updates = [rng.integers(-most, most, count, endpoint=True).astype(np.int32) for _ in range(parties)]
    for update in updates:
        update[:4] = [most, -most, 0, 1]  # the sums of the first two are as large as they can be
    total, seeds = RunningSum(BFV.blocks(count), form), []
    split = seeds_size(BFV.blocks(count), form)
    for update in updates:
        blob = worker.encrypt(BFV, form, SECRET, update)
        assert len(blob) == split + words_size(BFV.blocks(count), form)
        total.add(read_words(blob[split:], BFV.blocks(count), form))
        seeds.append(blob[:split])
    opened = worker.open(BFV, form, SECRET, count, seeds if split else [], total.words())
    assert np.array_equal(opened, np.sum(updates, axis=0))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_order_weights_and_dropouts(worker, pairs, data):
    scheme, form = data.draw(st.sampled_from(KINDS))
    weights = data.draw(st.lists(st.floats(1e-3, 1000), min_size=4, max_size=4))
    order = data.draw(st.permutations(range(4)))[: data.draw(st.integers(3, 4))]
    vectors = updates_of(4, 50, seed=data.draw(st.integers(0, 1000)), scale=data.draw(st.sampled_from([0.01, 0.5])))
    round_ = Round(pairs, worker, scheme, form)
    round_.agree_on_key()
    names = list(round_.sealers)
    for place in order:
        round_.submit(names[place], vectors[place], weights[place])
    result = round_.summer.finish({})
    assert round_.summer.survivors == tuple(sorted(names[place] for place in order))
    used = [weights[place] for place in order]
    expected = plain_mean([vectors[place] for place in order], used, 0.5)
    opened = [sealer.open(result) for sealer in round_.sealers.values() if sealer._secret is not None]
    step = Shape(round_.terms, SCHEMES[scheme], form).grid.step
    for each in opened:
        assert each.parties == len(order)
        assert each.weight == pytest.approx(sum(used), rel=1e-6)
        # one step a party for the rounding, and the weight's own grid
        assert np.abs(each.mean - expected).max() <= (len(order) * step + 1e-6) * 1000 / sum(used) + 1e-7
        assert np.array_equal(each.mean, opened[0].mean)


def test_ten_rows_under_a_cap_of_a_thousand_lose_nothing(worker):
    pairs, vectors = key_pairs(10), updates_of(10, 200)
    round_ = Round(pairs, worker, changes={"length": 200})
    result = round_.run(vectors, [10.0] * 10)
    opened = round_.sealers[pairs[0].public.decode()].open(result)
    assert np.abs(opened.mean - plain_mean(vectors, [10.0] * 10, 0.5)).max() < 1e-6 * 0.5 * 10
    assert opened.weight == pytest.approx(100, rel=1e-9)


def test_reach_in_bytes():
    for parties in (4, 10):
        terms = terms_of(key_pairs(parties), length=1_000_000)
        assert Shape(terms, BFV, "seeded").submission / terms.length <= 8.2
        assert Shape(terms, BFV, "public").submission / terms.length <= 16.2


def test_the_coordinator_keeps_one_sum_however_many_come(worker):
    """What it holds after each of six updates: the same, and no more than the first sum and one update at the peak."""
    pairs, length = key_pairs(6), 40_000
    round_ = Round(pairs, worker, changes={"length": length})
    round_.agree_on_key()
    vector, held = updates_of(1, length)[0], []
    size = Shape(round_.terms, BFV, "seeded").submission
    tracemalloc.start()
    try:
        for name, sealer in round_.sealers.items():
            blob = sealer.submit(vector, 1.0, round_.adverts, round_.shares_for(name))
            sealer._submitted = b"-"  # else the parties' copies, which are in this process, would be counted too
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            round_.summer.accept(name, blob)
            after, peak = tracemalloc.get_traced_memory()
            assert peak - before < size / 10  # beside the update that was handed in
            held.append(after - len(blob))
            del blob
    finally:
        tracemalloc.stop()
    assert max(held) - min(held) < size / 10


def test_a_party_may_drop_at_any_stage(worker, pairs):
    """Nobody leads: it may be any of them, after its key, after its shares or after its update."""
    names = [keys.public.decode() for keys in pairs]
    vectors = updates_of(4, 50)
    for gone in names:
        staying = [name for name in names if name != gone]
        for last_stage in ("advertise", "share", "submit"):
            round_ = Round(pairs, worker)
            round_.agree_on_key(sharing=staying if last_stage == "advertise" else None)
            there = names if last_stage == "submit" else staying
            for name in there:
                round_.submit(name, vectors[names.index(name)])
            result = round_.summer.finish({})
            opened = round_.sealers[staying[0]].open(result)
            expected = plain_mean([vectors[names.index(name)] for name in there], [1.0] * len(there), 0.5)
            assert np.abs(opened.mean - expected).max() < 1e-3
            assert opened.parties == len(there)


def test_a_new_attempt_is_opened_with_another_key(worker, pairs):
    vectors = updates_of(4, 50)
    before = Round(pairs, worker)
    old = before.run(vectors, [1.0] * 4)
    again = Round(pairs, worker, changes={"attempt": 1})
    result = again.run(vectors, [1.0] * 4)
    name = pairs[0].public.decode()
    assert before.sealers[name]._secret != again.sealers[name]._secret
    with pytest.raises(WireError, match="another round or attempt"):
        again.sealers[name].open(old)
    assert again.sealers[name].open(result).parties == 4


# ---- the parts


def test_the_parameters_are_seals_own():
    primes = [modulus.value() for modulus in seal.CoeffModulus.Create(DEGREE, list(MODULUS_BITS))]
    assert primes[0] == DATA_PRIME
    assert 2**60 - 2**20 < DATA_PRIME < 2**60  # what `RunningSum` relies on
    assert seal.PlainModulus.Batching(DEGREE, 30).value() == PLAIN_MODULUS
    assert seal.CoeffModulus.MaxBitCount(DEGREE, seal.SEC_LEVEL_TYPE.TC128) >= sum(MODULUS_BITS)


def test_the_running_sum():
    rng = np.random.default_rng(0)
    updates = [rng.integers(0, DATA_PRIME, 2 * DEGREE).astype(np.uint64) for _ in range(40)]
    updates[0][:] = DATA_PRIME - 1
    total = RunningSum(2, "seeded")
    for count, update in enumerate(updates, start=1):
        total.add(update)
        if count in (1, 14, 15, 16, 29, 40):
            expected = np.sum([each.astype(object) for each in updates[:count]], axis=0) % DATA_PRIME
            assert np.array_equal(np.frombuffer(total.words(), dtype="<u8"), expected.astype(np.uint64))
    largest = RunningSum(1, "seeded")
    for _ in range(100):
        largest.add(np.full(DEGREE, DATA_PRIME - 1, dtype=np.uint64))
    assert set(np.frombuffer(largest.words(), dtype="<u8").tolist()) == {100 * (DATA_PRIME - 1) % DATA_PRIME}


def test_the_secret_key_is_the_same_everywhere():
    """A machine on which this fails could not take part in a round with others."""
    scratch = Scratch()
    words = key_words(scratch, SECRET)
    scratch.close()
    assert words.shape == (2 * DEGREE,)
    assert hashlib.sha256(words.astype("<u8").tobytes()).hexdigest() == (
        "77481fe706afae745a3219fa67ab0d224d17061a1c538aa1bfa2701d06157def"
    )


def test_secret_keys_are_ternary_and_differ():
    """Read back through the ciphertext of 0 with c1 = 1: its decryption holds the key's own coefficients."""
    from splitfl.aggregation.he_child import Engine
    from splitfl.aggregation.seal_objects import parameters

    scratch, keys = Scratch(), []
    for secret in (SECRET, bytes(32)):
        engine = Engine(parameters(BFV, scratch), secret)
        c0, c1 = np.zeros(DEGREE, dtype=np.uint64), np.zeros(DEGREE, dtype=np.uint64)
        c1[0] = DATA_PRIME // PLAIN_MODULUS  # times s is s, in units of the plaintext
        keys.append(engine._decode(engine.known.ciphertext(c0, c1)))
    scratch.close()
    for key in keys:
        counts = np.bincount(key + 1, minlength=3)
        assert counts.sum() == DEGREE
        assert counts.size == 3
        assert np.abs(counts - DEGREE / 3).max() < 5 * (DEGREE * 2 / 9) ** 0.5
    assert not np.array_equal(*keys)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_tags_fit_the_sum_and_nothing_else(data):
    count = data.draw(st.integers(1, 3 * 10**5))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    parties = ["a", "b", "c"]
    updates = {party: rng.integers(-(10**8), 10**8, count).astype(np.int32) for party in parties}
    total = np.sum(list(updates.values()), axis=0, dtype=np.int32)
    limbs = np.sum([tag(SECRET, party, update) for party, update in updates.items()], axis=0, dtype=np.int32)
    assert fits(SECRET, parties, total, limbs)
    changed = total.copy()
    changed[data.draw(st.integers(0, count - 1))] += data.draw(st.sampled_from([1, -1, 12345]))
    assert not fits(SECRET, parties, changed, limbs)
    assert not fits(bytes(32), parties, total, limbs)
    assert not fits(SECRET, ["a", "b"], total, limbs)
    assert not fits(SECRET, ["a", "b", "b"], total, limbs)
    assert not fits(SECRET, parties, total + total, limbs + limbs)


def test_tags_against_the_formula():
    import hmac

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    values = np.array([5, -7, 2**29, -(2**29)], dtype=np.int32)
    for number, (high, low) in enumerate(tag(SECRET, "party", values).reshape(-1, 2).tolist()):
        key = hmac.digest(SECRET, b"splitfl sum tag coefficients" + bytes([number]), "sha256")
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(16))
        r = [int.from_bytes(stream[i : i + 4], "little") % 2**30 for i in range(0, 16, 4)]
        f = int.from_bytes(hmac.digest(SECRET, b"splitfl sum tag of a party" + bytes([number]) + b"party", "sha256"))
        assert (high << 15) + low == (sum(x * y for x, y in zip(r, values.tolist(), strict=True)) + f) % PLAIN_MODULUS
        assert 0 <= low < 2**15
        assert 0 <= high < 2**15


def test_what_is_in_an_update(pairs):
    shape = Shape(terms_of(pairs), BFV, "seeded")
    assert shape.values == 50 + EXTRA + LIMBS
    assert shape.grid.levels * 4 <= BFV.largest
    assert shape.submission == 16 + 64 + 8 * DEGREE + SIGNATURE
