"""A sum in the clear, against numpy; what parties may send that is wrong."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.aggregation.plain import PlainSealer, PlainSummer
from splitfl.aggregation.sums import Sealer, Summer
from splitfl.errors import DataError, InternalError, UsageError, WireError
from tests.aggregation.rounds_in_memory import Round, terms_of, updates

D = 20


def round_of(parties, **changes) -> Round:
    terms = terms_of(parties, D, **changes)
    sealers: dict[str, Sealer] = {party: PlainSealer(terms) for party in terms.parties}
    summer: Summer = PlainSummer(terms)
    return Round(sealers, summer)


def submit_only(what, vectors, weights, order=None):
    parties = list(what.sealers)
    for place in order or range(len(parties)):
        blob = what.sealers[parties[place]].submit(vectors[place], weights[place], {}, {})
        what.summer.accept(parties[place], blob)
    return what.summer.finish({})


@settings(max_examples=50, deadline=None)
@given(data=st.data(), weights=st.lists(st.floats(1e-3, 1000), min_size=1, max_size=8))
def test_the_mean_is_numpys_in_any_order(data, weights):
    what, vectors = round_of(len(weights)), updates(len(weights), D)
    order = data.draw(st.permutations(range(len(weights))))
    result = submit_only(what, vectors, weights, order)
    expected = np.average(np.clip(vectors, -0.5, 0.5).astype(np.float64), axis=0, weights=weights)
    for side in (what.summer, *what.sealers.values()):
        opened = side.open(result)
        np.testing.assert_allclose(opened.mean, expected, atol=1e-7)
        assert opened.weight == pytest.approx(sum(weights))
        assert opened.parties == len(weights)
    assert what.summer.survivors == tuple(sorted(what.sealers))


def test_one_party_gets_its_own_update_back_to_the_bit():
    what, vectors = round_of(1), updates(1, D)
    vectors[0] = np.clip(vectors[0], -0.4, 0.4)
    np.testing.assert_array_equal(what.summer.open(submit_only(what, vectors, [3.0])).mean, vectors[0])


@pytest.mark.parametrize("clip", [0.1, 0.5, 1 / 3, 1e-3])
def test_values_at_the_clip_pass(clip):
    """Also where the nearest float32 to the clip lies beyond it."""
    what = round_of(2, clip=clip)
    vectors = [np.full(D, sign * 9, dtype=np.float32) for sign in (1, 1)]
    opened = what.summer.open(submit_only(what, vectors, [1.0, 2.0]))
    np.testing.assert_allclose(opened.mean, clip, rtol=1e-6)


def blob_of(values, weight, like):
    return np.asarray(values, dtype="<f4").tobytes() + struct.pack("<d", weight) + like[-32:]


WRONG = {
    "empty": lambda blob: b"",
    "short": lambda blob: blob[:-1],
    "long": lambda blob: blob + b"\0",
    "no round": lambda blob: blob[:-32] + bytes(32),
    "not a number": lambda blob: blob_of([np.nan] * D, 1.0, blob),
    "one infinite": lambda blob: blob_of([0.0] * (D - 1) + [np.inf], 1.0, blob),
    "beyond the clip": lambda blob: blob_of([0.0] * (D - 1) + [-0.51], 1.0, blob),
    "weight 0": lambda blob: blob_of([0.0] * D, 0.0, blob),
    "weight too large": lambda blob: blob_of([0.0] * D, 1000.5, blob),
    "weight not a number": lambda blob: blob_of([0.0] * D, np.nan, blob),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_update_is_refused_and_changes_nothing(name):
    what, vectors = round_of(3), updates(3, D)
    parties = list(what.sealers)
    blobs = [what.sealers[party].submit(vectors[i], 1.0, {}, {}) for i, party in enumerate(parties)]
    what.summer.accept(parties[0], blobs[0])
    with pytest.raises(WireError):
        what.summer.accept(parties[1], WRONG[name](blobs[1]))
    what.summer.accept(parties[2], blobs[2])
    opened = what.summer.open(what.summer.finish({}))
    assert opened.parties == 2
    expected = np.mean(np.clip([vectors[0], vectors[2]], -0.5, 0.5), axis=0)
    np.testing.assert_allclose(opened.mean, expected, atol=1e-7)


def test_strangers_doubles_and_other_rounds_are_refused():
    what, vectors = round_of(3), updates(3, D)
    party, other, *_ = what.sealers
    blob = what.sealers[party].submit(vectors[0], 1.0, {}, {})
    what.summer.accept(party, blob)
    with pytest.raises(WireError, match="already"):
        what.summer.accept(party, blob)
    with pytest.raises(WireError, match="not of this round"):
        what.summer.accept("x" * 40, blob)
    for change in ({"round": 1}, {"attempt": 1}, {"federation": "1" * 32}, {"layout": "b"}, {"clip": 0.6}):
        stale = PlainSealer(dataclasses.replace(what.summer.terms, **change)).submit(vectors[1], 1.0, {}, {})
        with pytest.raises(WireError, match="another round"):
            what.summer.accept(other, stale)


def test_a_party_refuses_what_it_cannot_send():
    sealer = next(iter(round_of(1).sealers.values()))
    for vector in (np.zeros(D), np.zeros(D + 1, dtype=np.float32), np.zeros((1, D), dtype=np.float32)):
        with pytest.raises(DataError, match="shape"):
            sealer.submit(vector, 1.0, {}, {})
    with pytest.raises(DataError, match="not finite"):
        sealer.submit(np.full(D, np.nan, dtype=np.float32), 1.0, {}, {})
    with pytest.raises(DataError, match="weight"):
        sealer.submit(np.zeros(D, dtype=np.float32), 0.0, {}, {})


def test_a_result_is_checked_by_those_who_get_it():
    what = round_of(2)
    result = submit_only(what, updates(2, D), [1.0, 1.0])
    sealer = next(iter(what.sealers.values()))
    huge = np.full(D, 0.6, dtype="<f4").tobytes() + result[4 * D :]
    heavy = result[: 4 * D] + struct.pack("<dQ", 2001.0, 2) + result[-32:]
    many = result[: 4 * D] + struct.pack("<dQ", 2.0, 3) + result[-32:]
    for wrong in (b"", result[:-1], result + b"\0", result[:-1] + b"\0", huge, heavy, many):
        with pytest.raises(WireError):
            sealer.open(wrong)


def test_an_empty_sum_and_stages_that_there_are_not():
    what = round_of(2)
    with pytest.raises(WireError, match="Nobody"):
        what.summer.finish({})
    sealer = next(iter(what.sealers.values()))
    for call in (sealer.advertise, lambda: sealer.share({}), lambda: sealer.agree([]), lambda: sealer.reveal([], {})):
        with pytest.raises(InternalError, match="no stage"):
            call()


@pytest.mark.parametrize(
    "change",
    [{"length": 0}, {"clip": 0.0}, {"clip": np.nan}, {"max_weight": np.inf}, {"parties": ()}, {"parties": ("x",)},
     {"parties": ("é" * 40,)}, {"round": -1}, {"attempt": 2**63}],
)  # fmt: skip
def test_terms_that_cannot_be_are_refused(change):
    with pytest.raises(UsageError):
        PlainSummer(dataclasses.replace(terms_of(2), **change))
    terms = terms_of(2)
    with pytest.raises(UsageError):
        PlainSummer(dataclasses.replace(terms, parties=terms.parties[::-1]))
    with pytest.raises(UsageError):
        PlainSummer(dataclasses.replace(terms, parties=terms.parties[:1] * 2))
