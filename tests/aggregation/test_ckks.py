"""What is particular to CKKS; what it shares with BFV is in test_bfv.py."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("tenseal")

from splitfl.aggregation.encrypted import Shape
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.lattice import CKKS, DATA_PRIME, DEGREE
from splitfl.errors import WireError
from tests.aggregation.encrypted_rounds import Round, key_pairs, plain_mean, terms_of, updates_of

SECRET = bytes(range(32))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        started.check()
        yield started


def test_sizes():
    terms = terms_of(key_pairs(10), length=1_000_000)
    assert Shape(terms, CKKS, "seeded").submission / terms.length < 16.2
    assert Shape(terms, CKKS, "public").submission / terms.length < 32.2


def test_the_grid_is_a_millionth_of_the_clip():
    shape = Shape(terms_of(key_pairs(10)), CKKS, "seeded")
    assert shape.grid.levels == 1 << 20
    assert shape.grid.step == 0.5 / (1 << 20)


def test_the_mean_is_as_good_as_the_grid(worker):
    pairs, weights = key_pairs(3), [1000.0, 500.0, 10.0]
    vectors = updates_of(3, 5000)
    round_ = Round(pairs, worker, "ckks", changes={"length": 5000})
    result = round_.run(vectors, weights)
    opened = round_.sealers[pairs[0].public.decode()].open(result)
    step = 0.5 / (1 << 20) * 1000 / sum(weights)
    assert np.abs(opened.mean - plain_mean(vectors, weights, 0.5)).max() <= 3 * step
    assert opened.weight == pytest.approx(sum(weights), rel=1e-9)


def test_a_value_off_the_grid_is_refused_and_not_shown(worker):
    values = np.arange(10, dtype=np.int32)
    blob = worker.encrypt(CKKS, "public", SECRET, values)
    words = np.frombuffer(blob, dtype="<u8").copy()
    # In NTT form, a constant added to every word of c0 is the same constant added to every slot: 0.3 of a step.
    words[:DEGREE] = (words[:DEGREE] + np.uint64(int(0.3 * 2**30))) % np.uint64(DATA_PRIME)
    with pytest.raises(WireError, match="grid") as error:
        worker.open(CKKS, "public", SECRET, 10, [], words.tobytes())
    assert not any(character.isdigit() for character in str(error.value))
    words[:DEGREE] = (words[:DEGREE] + np.uint64(round(0.7 * 2**30))) % np.uint64(DATA_PRIME)
    assert np.array_equal(worker.open(CKKS, "public", SECRET, 10, [], words.tobytes()), values + 1)


def test_another_key_opens_nothing(worker):
    blob = worker.encrypt(CKKS, "public", SECRET, np.arange(10, dtype=np.int32))
    with pytest.raises(WireError, match="grid"):
        worker.open(CKKS, "public", bytes(32), 10, [], blob)


def test_noise_stays_far_from_the_tolerance(worker):
    """128 ciphertexts in one sum still lie next to the grid."""
    values = np.full(CKKS.slots, 1 << 20, dtype=np.int32)
    total = np.zeros(2 * DEGREE, dtype=np.uint64)
    for _ in range(128):
        one = np.frombuffer(worker.encrypt(CKKS, "public", SECRET, values), dtype="<u8")
        total = (total + one) % np.uint64(DATA_PRIME)
    opened = worker.open(CKKS, "public", SECRET, values.size, [], total.astype("<u8").tobytes())
    assert np.array_equal(opened, 128 * values)
