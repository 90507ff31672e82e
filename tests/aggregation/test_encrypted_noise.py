"""Noise of which each party adds a share, on encrypted sums: enough on the sum, and room for it in the plaintext."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from splitfl.aggregation.encrypted import Shape
from splitfl.aggregation.he_worker import Worker
from splitfl.aggregation.lattice import PLAIN_MODULUS, SCHEMES
from splitfl.aggregation.noise import MASKED, plan_noise, space_of
from splitfl.aggregation.noiser import Noiser
from splitfl.errors import DataError, UsageError, WireError
from tests.aggregation.encrypted_rounds import CLASSES, KINDS, Round, identities_of, key_pairs, terms_of
from tests.aggregation.test_noise import within

D = 4000


@pytest.fixture(scope="module")
def worker():
    with Worker() as there:
        there.check()
        yield there


def planner(scheme, **changes):
    figures = {"norm": 1.0, "rounds": 5, "delta": 1e-5, "multiplier": 0.3, "space": space_of(scheme)} | changes
    return lambda terms: plan_noise(terms, **figures)


def round_of(worker, folder, count, scheme="bfv", form="seeded", pairs=None, noise=None, **changes):
    pairs = pairs or key_pairs(count)
    return Round(
        pairs, worker, scheme, form, {"length": D, **changes}, plan=planner(scheme, **(noise or {})), folder=folder
    )


def summed(what, vectors, absent=()):
    """What the sum of the updates of all who are not absent is opened to, float64 [D]."""
    there = [party for place, party in enumerate(what.sealers) if place not in absent]
    what.agree_on_key()
    for party, vector in zip(what.sealers, vectors, strict=True):
        if party in there:
            what.submit(party, vector, what.terms.max_weight)
    opened = what.sealers[there[0]].open(what.summer.finish({}))
    return opened.mean.astype(np.float64) * len(there)


# ---- how much there is


@pytest.mark.parametrize(("scheme", "form"), KINDS)
def test_the_sum_has_the_noise_that_was_promised_also_with_a_dropout(worker, tmp_path, scheme, form):
    vectors = [np.full(D, 0.004 * place, dtype=np.float32) for place in range(5)]  # norms of at most 1.02
    for absent in ((), (2,)):
        noise = {"dropouts": 1, "colluders": 1}
        what = round_of(worker, tmp_path / str(absent), 5, scheme, form, noise=noise)
        plan = planner(scheme, **noise)(what.terms)
        left = summed(what, vectors, absent) - sum(v for place, v in enumerate(vectors) if place not in absent)
        assert within(left.std(), plan.smallest_noise * math.sqrt((5 - len(absent)) / 3), D)
        assert abs(left.mean()) < 6 * left.std() / math.sqrt(D) + 1e-3  # the longest update was cut by 2 percent
        assert left.std() > 0.3 * 2 * 1.0


@pytest.mark.parametrize("scheme", CLASSES)
def test_with_dropouts_and_colluders_exactly_the_promised_noise_is_left(worker, tmp_path, scheme):
    """Four of six are in the sum, and one of them takes its own noise off: three shares stay."""
    noise = {"dropouts": 2, "colluders": 1}
    what = round_of(worker, tmp_path, 6, scheme, noise=noise)
    plan = planner(scheme, **noise)(what.terms)
    total = summed(what, [np.zeros(D, dtype=np.float32)] * 6, absent=(1, 5))
    (kept,) = (tmp_path / "0").glob("noised-*")
    own = np.frombuffer(kept.read_bytes(), dtype="<i4", offset=32)[:D] * plan.step
    assert within((total - own).std(), plan.smallest_noise, D)
    assert plan.smallest_noise >= plan.multiplier * plan.sensitivity
    assert within(own.std(), plan.smallest_noise / math.sqrt(3), D)


def test_two_parties_may_sum_with_noise(worker, tmp_path):
    what = round_of(worker, tmp_path, 2, noise={"colluders": 1})
    with pytest.raises(WireError, match="2 parties"):
        summed(what, [np.zeros(D, dtype=np.float32)] * 2)
    what = Round(
        key_pairs(2), worker, changes={"length": D}, allow_two=True, plan=planner("bfv", colluders=1), folder=tmp_path
    )
    plan = planner("bfv", colluders=1)(what.terms)
    assert within(summed(what, [np.zeros(D, dtype=np.float32)] * 2).std(), plan.smallest_noise * math.sqrt(2), D)


# ---- dropouts beyond the plan, other attempts


def test_with_more_dropouts_neither_side_opens_the_sum(worker, tmp_path):
    pairs = key_pairs(5)
    what = round_of(worker, tmp_path, 5, pairs=pairs, noise={"dropouts": 1}, length=50)
    vectors = [np.zeros(50, dtype=np.float32)] * 5
    with pytest.raises(WireError, match="3 updates"):
        summed(what, vectors, absent=(1, 2))
    what.summer._shape = dataclasses.replace(what.summer._shape, noise=None)  # a coordinator that goes on all the same
    party = what.sealers[pairs[0].public.decode()]
    result = party._shape.binding + what.summer.finish({})[32:]
    with pytest.raises(WireError, match="3 parties in its sum"):
        party.open(result)


@pytest.mark.parametrize("scheme", CLASSES)
def test_another_attempt_carries_the_same_noise(worker, tmp_path, scheme):
    pairs, vectors = key_pairs(3), [np.zeros(D, dtype=np.float32)] * 3
    failed = round_of(worker, tmp_path, 3, scheme, pairs=pairs)
    failed.agree_on_key()
    failed.submit(pairs[0].public.decode(), vectors[0], 1000.0)
    (kept,) = (tmp_path / "0").glob("noised-*")
    own = np.frombuffer(kept.read_bytes(), "<i4", offset=32)[:D].copy()
    first = summed(round_of(worker, tmp_path, 3, scheme, pairs=pairs, attempt=1), vectors)
    np.testing.assert_array_equal(own, np.frombuffer(kept.read_bytes(), "<i4", offset=32)[:D])
    third = summed(round_of(worker, tmp_path, 3, scheme, pairs=pairs, round=4), vectors)
    assert not np.array_equal(first, third)
    assert not kept.exists()


def test_another_update_in_the_same_round_is_refused(worker, tmp_path):
    pairs, zeros = key_pairs(3), np.zeros(D, dtype=np.float32)
    for attempt, vector in enumerate([zeros, zeros + np.float32(0.01)]):
        what = round_of(worker, tmp_path, 3, pairs=pairs, attempt=attempt)
        what.agree_on_key()
        if attempt == 0:
            what.submit(pairs[0].public.decode(), vector, 1000.0)
            continue
        with pytest.raises(DataError, match="second release"):
            what.submit(pairs[0].public.decode(), vector, 1000.0)


def test_after_a_sum_was_opened_there_is_no_other_one_in_its_round(worker, tmp_path):
    pairs, vectors = key_pairs(3), [np.zeros(D, dtype=np.float32)] * 3
    summed(round_of(worker, tmp_path, 3, pairs=pairs), vectors)
    again = round_of(worker, tmp_path, 3, pairs=pairs, attempt=1)
    again.agree_on_key()
    opener, other = (keys.public.decode() for keys in pairs[:2])
    with pytest.raises(WireError, match="opened in an earlier attempt"):
        again.submit(opener, vectors[0], 1000.0)
    again.submit(other, vectors[1], 1000.0)  # which had not opened it


# ---- room


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("parties", [3, 10, 50])
def test_sum_and_noise_fit_into_the_plaintext(scheme, parties):
    terms = terms_of(key_pairs(parties), length=10**6)
    plan = planner(scheme, colluders=parties // 3, dropouts=1)(terms)
    shape = Shape(terms, SCHEMES[scheme], "seeded", plan)
    needed = parties * shape.grid.levels + 12 * plan.sigma * math.sqrt(parties)
    assert needed <= shape.grid.half <= SCHEMES[scheme].largest <= (PLAIN_MODULUS - 1) // 2
    assert shape.grid.levels <= SCHEMES[scheme].finest
    assert shape.grid.step == pytest.approx(plan.step)
    assert shape.grid.reserve >= 12 * plan.sigma * math.sqrt(parties)


@pytest.mark.parametrize("scheme", CLASSES)
def test_noise_that_does_not_fit_is_refused(scheme):
    terms = terms_of(key_pairs(10), clip=0.01)
    largest = SCHEMES[scheme].largest / 4096 * 0.01 / (12 * 2)  # with 4096 steps to the clip
    planner(scheme, multiplier=0.9 * largest)(terms)
    with pytest.raises(UsageError, match=f"does not fit into sums.*{scheme}"):
        planner(scheme, multiplier=1.1 * largest)(terms)
    planner("mask", multiplier=1.1 * largest)(terms)


def test_a_large_sum_of_noise_wraps_nowhere(worker, tmp_path):
    """Half the plaintext is noise: a figure that were cut or wrapped would show in the largest ones."""
    noise = {"multiplier": 30.0, "norm": 5.0}
    for scheme in CLASSES:
        what = round_of(worker, tmp_path / scheme, 4, scheme, noise=noise)
        plan = planner(scheme, **noise)(what.terms)
        total = summed(what, [np.zeros(D, dtype=np.float32)] * 4)
        own = [np.frombuffer(next((tmp_path / scheme / str(n)).glob("noised-*")).read_bytes(), "<i4", offset=32)[:D]
               for n in range(4)]  # fmt: skip
        np.testing.assert_allclose(total, sum(each.astype(np.int64) for each in own) * plan.step, rtol=1e-6)
        assert within(total.std(), plan.smallest_noise, D)


# ---- what is promised, and to whom


def test_the_claim_says_what_the_shared_key_means():
    terms = terms_of(key_pairs(6), length=1000)
    plan = planner("bfv", multiplier=2.0, colluders=2)(terms)
    alone = plan.epsilon_alone()
    assert "without the coordinator" in plan.claim()
    assert f"epsilon {math.ceil(1000 * alone) / 1000:g})" in plan.claim()
    assert alone > plan.epsilon()
    local = planner("bfv", multiplier=2.0, colluders=5)(terms)  # one share must do: then the two are the same
    assert local.epsilon_alone() == pytest.approx(local.epsilon())
    assert "without the coordinator" not in planner("mask", multiplier=2.0, colluders=2)(terms).claim()
    same = planner("mask", multiplier=2.0, colluders=2)(terms)
    assert plan.epsilon() == pytest.approx(same.epsilon(), rel=1e-3)


def test_a_plan_is_for_its_way_of_summing(tmp_path):
    pairs = key_pairs(3)
    terms, identities = terms_of(pairs), identities_of(pairs)
    for scheme, (sealer, summer) in CLASSES.items():
        for other in {"bfv", "ckks", "mask"} - {scheme}:
            plan = planner(other)(terms)
            with pytest.raises(UsageError, match=f"planned for sums of {other}"):
                summer(terms, identities, noise=plan)
            with pytest.raises(UsageError, match=f"planned for sums of {other}"):
                sealer(terms, pairs[0], identities, noise=plan, noiser=Noiser(tmp_path))
        with pytest.raises(UsageError, match="keep"):
            sealer(terms, pairs[0], identities, noise=planner(scheme)(terms))
        with pytest.raises(UsageError, match="rounds"):
            summer(dataclasses.replace(terms, round=5), identities, noise=planner(scheme)(terms))
    assert space_of("mask+hidden") == space_of("mask") == MASKED


def test_a_party_with_another_plan_is_not_of_the_round(worker, tmp_path):
    pairs = key_pairs(3)
    one = round_of(worker, tmp_path, 3, pairs=pairs)
    other = round_of(worker, tmp_path, 3, pairs=pairs, noise={"multiplier": 0.1})
    first, second, third = (keys.public.decode() for keys in pairs)
    adverts = {
        first: one.sealers[first].advertise(), second: other.sealers[second].advertise(),
        third: one.sealers[third].advertise(),
    }  # fmt: skip
    with pytest.raises(WireError, match="signature"):
        one.sealers[first].share(adverts)
