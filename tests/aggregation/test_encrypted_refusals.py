"""What coordinator and parties of an encrypted sum refuse; with both schemes and both forms."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("tenseal")


from splitfl.aggregation.encrypted import Shape
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.lattice import (
    BFV,
    DATA_PRIME,
    DEGREE,
    PLAIN_MODULUS,
    SCHEMES,
)
from splitfl.aggregation.sealed import SIGNATURE, signed
from splitfl.aggregation.tags import LIMBS, tag
from splitfl.errors import DataError, InternalError, UsageError, WireError
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


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def fresh(request, worker, pairs):
    """A round in which the four parties have agreed on their secret."""
    scheme, form = request.param
    round_ = Round(pairs, worker, scheme, form)
    round_.agree_on_key()
    return round_


@pytest.fixture
def four(fresh):
    """The same, and all four have submitted."""
    for party, vector in zip(fresh.sealers, updates_of(4, 50), strict=True):
        fresh.submit(party, vector)
    return fresh


# ---- what a coordinator refuses


def test_a_second_update_of_one_party(four):
    before = four.summer.finish({})
    with pytest.raises(WireError, match="second update"):
        four.summer.accept(next(iter(four.sealers)), four.messages[-4])
    assert four.summer.finish({}) == before


def test_an_update_in_another_name(fresh):
    a, b, *_ = fresh.sealers
    blob = fresh.submission(a, updates_of(1, 50)[0])
    with pytest.raises(WireError, match="signature"):
        fresh.summer.accept(b, blob)
    with pytest.raises(WireError, match="party of the round"):
        fresh.summer.accept(key_pairs(1)[0].public.decode(), blob)
    assert fresh.summer.survivors == ()
    with pytest.raises(WireError, match="No update"):
        fresh.summer.finish({})


@pytest.mark.parametrize("changes", [{"round": 4}, {"attempt": 1}, {"federation": "ef" * 16}, {"clip": 1.0}])
def test_an_update_of_another_round(worker, pairs, fresh, changes):
    other = Round(pairs, worker, fresh.scheme, fresh.form, changes)
    other.agree_on_key()
    name = next(iter(other.sealers))
    with pytest.raises(WireError, match="signature"):
        fresh.summer.accept(name, other.submission(name, updates_of(1, 50)[0]))


def test_sizes_come_first(fresh):
    name = next(iter(fresh.sealers))
    blob = fresh.submission(name, updates_of(1, 50)[0])
    for wrong in (b"", blob[:-1], blob + b"\0", blob[: len(blob) // 2], blob * 2):
        with pytest.raises(WireError, match="bytes"):
            fresh.summer.accept(name, wrong)


def test_three_hundred_mutations_do_not_reach_the_sum(fresh):
    name = next(iter(fresh.sealers))
    blob, rng = fresh.submission(name, updates_of(1, 50)[0]), np.random.default_rng(0)
    for _ in range(300):
        mutated = bytearray(blob)
        mutated[rng.integers(len(blob))] ^= rng.integers(1, 256)
        with pytest.raises(WireError):
            fresh.summer.accept(name, bytes(mutated))
    assert fresh.summer.survivors == ()
    fresh.summer.accept(name, blob)


def test_a_signed_update_with_unreduced_words(fresh, pairs):
    """From a party of the round that builds its own bytes."""
    name = pairs[0].public.decode()
    blob, sealer = fresh.submission(name, updates_of(1, 50)[0]), fresh.sealers[name]
    body = bytearray(blob[:-SIGNATURE])
    for wrong in (DATA_PRIME, 2**64 - 1):
        body[-8:] = wrong.to_bytes(8, "little")
        with pytest.raises(WireError, match="not reduced"):
            fresh.summer.accept(name, signed(sealer._identity, b"update", sealer._shape.binding, name, bytes(body)))
    fresh.summer.accept(name, blob)


# ---- what a party refuses


def _tampered(round_: Round, result: bytes) -> dict[str, bytes]:
    """Results that a coordinator could make without the secret."""
    shape = Shape(round_.terms, SCHEMES[round_.scheme], round_.form)
    head, roll_at = len(result) - shape.words, 32
    words = np.frombuffer(result, dtype="<u8", offset=head)
    one = np.frombuffer(round_.messages[-4], dtype="<u8", offset=16 + shape.seeds, count=shape.words // 8)
    prime = np.uint64(DATA_PRIME)

    def with_words(new: np.ndarray) -> bytes:
        return result[:head] + new.astype("<u8").tobytes()

    delta = words.copy()
    delta[0] = (delta[0] + np.uint64(DATA_PRIME // PLAIN_MODULUS)) % prime  # BFV: 1 more in the first value
    shifted = words.copy()
    shifted[:DEGREE] = (shifted[:DEGREE] + np.uint64(1 << 30)) % prime  # CKKS: a step more in every value
    found = {
        "one more in the first value": with_words(delta),
        "one more in every value": with_words(shifted),
        "one update left out": with_words((words + prime - one) % prime),
        "one update twice": with_words((words + one) % prime),
        "all of it twice": with_words(words * np.uint64(2) % prime),
        "nothing": with_words(np.zeros_like(words)),
    }
    fewer = result[roll_at] & 0b0111
    lies = result[:roll_at] + bytes([fewer]) + result[roll_at + 1 :]
    found["three named, four in it"] = lies if round_.form == "public" else lies[: head - shape.seeds] + lies[head:]
    return found


def test_sums_that_the_coordinator_has_changed_do_not_open(four, worker, pairs):
    result = four.summer.finish({})
    for what, changed in _tampered(four, result).items():
        sealer = four.sealers[pairs[0].public.decode()]
        sealer._result = b""  # each lie gets a party that has not heard one yet
        with pytest.raises(WireError, match=r"not the sum|grid|refused"):
            sealer.open(changed)
        print("refused:", what)  # shows how far it came, where one of them is not
    sealer = four.sealers[pairs[1].public.decode()]
    assert sealer.open(result).parties == 4
    assert sealer.open(result).parties == 4


def test_one_lie_and_the_attempt_is_over(four, pairs):
    """A party that answered to variations of a sum would be an oracle."""
    result = four.summer.finish({})
    sealer = four.sealers[pairs[0].public.decode()]
    with pytest.raises(WireError):
        sealer.open(_tampered(four, result)["one update twice"])
    with pytest.raises(WireError, match="second, different"):
        sealer.open(result)


def test_results_of_a_wrong_size_or_round(four, pairs):
    result = four.summer.finish({})
    sealer = four.sealers[pairs[0].public.decode()]
    for wrong in (b"", result[:-1], result + b"\0", result[:40]):
        with pytest.raises(WireError, match="bytes"):
            sealer.open(wrong)
    with pytest.raises(WireError, match="another round"):
        sealer.open(bytes(32) + result[32:])
    nobody = result[:32] + b"\0" + result[33:]
    with pytest.raises(WireError):
        sealer.open(nobody)
    unreduced = result[:-8] + b"\xff" * 8
    with pytest.raises(WireError, match="not reduced"):
        sealer.open(unreduced)
    with pytest.raises(WireError, match="second, different"):
        sealer.open(result)


def test_a_mean_beyond_the_clip_is_dropped(worker, pairs):
    """A party of the group, who can make its own tags, sends more than the clip allows."""
    round_ = Round(pairs, worker)
    round_.agree_on_key()
    names, vectors = list(round_.sealers), updates_of(4, 50)
    for name, vector in zip(names[1:], vectors[1:], strict=True):
        round_.submit(name, vector)
    round_.submission(names[0], vectors[0])
    sealer = round_.sealers[names[0]]
    shape, secret = sealer._shape, sealer._secret
    values = np.empty(shape.values, dtype=np.int32)
    shape.grid.encode(vectors[0], 1.0, out=values[:-LIMBS])
    values[0] = 4 * shape.grid.levels  # within what BFV can hold, far beyond the clip
    values[-LIMBS:] = tag(secret.tags, names[0], values[:-LIMBS])
    blob = worker.encrypt(BFV, "seeded", secret.key, values)
    round_.summer.accept(names[0], signed(sealer._identity, b"update", shape.binding, names[0], secret.name + blob))
    with pytest.raises(WireError, match="beyond the clip"):
        round_.sealers[names[1]].open(round_.summer.finish({}))


def test_an_update_under_a_wrong_key_is_noticed(worker, pairs):
    """A party that encrypts garbage: whose it was cannot be seen, that the sum is wrong can."""
    round_ = Round(pairs, worker)
    round_.agree_on_key()
    names, vectors = list(round_.sealers), updates_of(4, 50)
    for name, vector in zip(names[1:], vectors[1:], strict=True):
        round_.submit(name, vector)
    round_.submission(names[0], vectors[0])
    sealer = round_.sealers[names[0]]
    blob = worker.encrypt(BFV, "seeded", SECRET, np.zeros(sealer._shape.values, dtype=np.int32))
    body = sealer._secret.name + blob
    round_.summer.accept(names[0], signed(sealer._identity, b"update", sealer._shape.binding, names[0], body))
    with pytest.raises(WireError, match="not the sum"):
        round_.sealers[names[1]].open(round_.summer.finish({}))


def test_few_parties(worker, pairs):
    for count, allow_two in ((1, False), (2, False), (1, True)):
        with pytest.raises(WireError, match=f"has {count} parties"):
            Round(pairs[:count], worker, allow_two=allow_two).agree_on_key()
    allowed = Round(pairs[:2], worker, allow_two=True)
    vectors = updates_of(2, 50)
    result = allowed.run(vectors, [1.0] * 2)
    opened = allowed.sealers[pairs[0].public.decode()].open(result)
    assert np.abs(opened.mean - plain_mean(vectors, [1.0] * 2, 0.5)).max() < 1e-3


def test_a_sum_over_two_of_four_is_not_opened(fresh):
    names, vectors = list(fresh.sealers), updates_of(4, 50)
    fresh.submission(names[2], vectors[2])
    for name, vector in zip(names[:2], vectors[:2], strict=True):
        fresh.submit(name, vector)
    with pytest.raises(WireError, match="at least 3"):
        fresh.sealers[names[2]].open(fresh.summer.finish({}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(fresh, bad):
    vector = updates_of(1, 50)[0]
    vector[7] = bad
    with pytest.raises(DataError, match="finite"):
        fresh.submission(next(iter(fresh.sealers)), vector)


def test_weights_and_shapes_out_of_range(fresh):
    name, vector = next(iter(fresh.sealers)), updates_of(1, 50)[0]
    for weight in (0.0, -1.0, 1000.1, np.nan):
        with pytest.raises(DataError, match="weight"):
            fresh.submission(name, vector, weight)
    for wrong in (vector[:-1], vector.astype(np.float64), vector.reshape(5, 10)):
        with pytest.raises(DataError, match="float32"):
            fresh.submission(name, wrong)


def test_stages_in_the_wrong_order(worker, pairs):
    round_ = Round(pairs, worker)
    sealer = next(iter(round_.sealers.values()))
    with pytest.raises(WireError, match="before"):
        sealer.open(b"")
    for stage in (lambda: sealer.agree([]), lambda: sealer.reveal([], {})):
        with pytest.raises(InternalError, match="no stage"):
            stage()
    with pytest.raises(UsageError, match="not among those"):
        type(sealer)(terms_of(key_pairs(3)), pairs[0], {}, worker=worker)


def test_an_update_is_encrypted_once(fresh):
    """A retry sends the same bytes; two encryptions of different updates would be two releases."""
    name, (one, other) = next(iter(fresh.sealers)), updates_of(2, 50)
    assert fresh.submission(name, one) == fresh.submission(name, other)
