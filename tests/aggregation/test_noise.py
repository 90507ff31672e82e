"""Noise of which each party adds a share: enough on the sum, whoever is missing or working against the others."""

from __future__ import annotations

import dataclasses
import math
import stat

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from splitfl.aggregation.hidden import HiddenSealer, HiddenSummer
from splitfl.aggregation.mask_sums import MaskSummer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.noise import grid_for, plan_noise
from splitfl.aggregation.noiser import Noiser
from splitfl.aggregation.wide_noise import draw, parts
from splitfl.errors import DataError, UsageError, WireError
from splitfl.privacy.discrete import LARGEST_SIGMA
from tests.aggregation.rounds_in_memory import Round, identities, pairs, terms_of

D = 4000


def plan_of(terms, **changes):
    return plan_noise(terms, **({"norm": 1.0, "rounds": 5, "delta": 1e-5, "multiplier": 2.0} | changes))


def round_of(terms, plan, folder, sealer=MaskSealer, summer=MaskSummer) -> Round:
    count = len(terms.parties)
    allow_two = count == 2
    members = {
        keys.public.decode(): sealer(
            terms, keys, identities(count), noise=plan, noiser=Noiser(folder / str(place)), allow_two=allow_two
        )
        for place, keys in enumerate(pairs()[:count])
    }
    return Round(members, summer(terms, identities(count), noise=plan, allow_two=allow_two))


def opened_by_a_survivor(what):
    return what.sealers[what.summer.survivors[0]].open(what.result)


def noise_seen(what, vectors) -> np.ndarray:
    """What the opened sum has on top of the updates' own sum, in the unit of the values."""
    members = what.summer.survivors
    opened = opened_by_a_survivor(what)
    own = sum(vectors[list(what.sealers).index(party)].astype(np.float64) for party in members)
    return opened.mean.astype(np.float64) * len(members) - own


def within(measured, expected, count):
    """A standard deviation from `count` draws, to within six of its own."""
    return abs(measured / expected - 1) < 6 / math.sqrt(2 * count)


# ---- how much there is


@pytest.mark.parametrize(("sealer", "summer"), [(MaskSealer, MaskSummer), (HiddenSealer, HiddenSummer)])
def test_the_sum_has_at_least_the_noise_that_was_promised(tmp_path, sealer, summer):
    terms = terms_of(5, D)
    plan = plan_of(terms, dropouts=1, colluders=1)
    vectors = [np.zeros(D, dtype=np.float32)] * 5
    for leave, there in (({}, 5), ({"submit": [2]}, 4), ({"agree": [4]}, 5)):
        what = round_of(terms, plan, tmp_path / str(leave.keys()), sealer, summer).run(vectors, [1000.0] * 5, leave)
        noise = noise_seen(what, vectors)
        assert within(noise.std(), plan.smallest_noise * math.sqrt(there / 3), D)
        assert abs(noise.mean()) < 6 * noise.std() / math.sqrt(D)
        assert noise.std() > 2.0 * 2 * 1.0  # multiplier times the sensitivity of replacing one, with room


def test_with_dropouts_and_colluders_exactly_the_promised_noise_is_left(tmp_path):
    """Four of six in the sum, and one of those four takes its own noise off: three shares stay, and are enough."""
    terms = terms_of(7, D)
    plan = plan_of(terms, dropouts=2, colluders=1)
    assert (plan.honest, plan.enough) == (4, 5)
    vectors = [np.zeros(D, dtype=np.float32)] * 7
    what = round_of(terms, plan, tmp_path).run(vectors, [1000.0] * 7, {"submit": [1, 6]})
    noise = noise_seen(what, vectors)
    (kept,) = (tmp_path / "0").glob("noised-*")
    own = np.frombuffer(kept.read_bytes(), dtype="<i4", offset=32)[:D] * plan.step
    left = noise - own
    assert within(left.std(), plan.smallest_noise, D)
    assert plan.smallest_noise >= plan.multiplier * plan.sensitivity


def test_with_more_dropouts_nothing_is_opened(tmp_path):
    terms = terms_of(8, 50)
    plan = plan_of(terms, dropouts=1)
    vectors = [np.zeros(50, dtype=np.float32)] * 8
    what = round_of(terms, plan, tmp_path).run(vectors, [1000.0] * 8, {"submit": [1, 2]}, until="agree")
    for party in what.summer.survivors:
        with pytest.raises(WireError, match="6 survivors"):
            what.sealers[party].agree(what.summer.survivors)
    with pytest.raises(WireError, match="6 updates"):
        what.summer.finish({})


def test_two_parties_may_sum_with_noise(tmp_path):
    terms = terms_of(2, D)
    plan = plan_of(terms, colluders=1)
    vectors = [np.zeros(D, dtype=np.float32)] * 2
    what = round_of(terms, plan, tmp_path).run(vectors, [1000.0] * 2)
    assert within(noise_seen(what, vectors).std(), plan.smallest_noise * math.sqrt(2), D)


def test_updates_are_cut_to_the_norm(tmp_path):
    """A huge update moves the mean by no more than the norm: seen below the noise of a small multiplier."""
    terms = terms_of(3, D, clip=100.0)
    plan = plan_of(terms, multiplier=1e-3, norm=5.0)
    vectors = [np.full(D, 3.0, dtype=np.float32), *[np.zeros(D, dtype=np.float32)] * 2]
    what = round_of(terms, plan, tmp_path).run(vectors, [1000.0] * 3)
    total = opened_by_a_survivor(what).mean.astype(np.float64) * 3
    expected = 5.0 / math.sqrt(D)
    assert abs(total.mean() - expected) < 6 * plan.smallest_noise / math.sqrt(D) + 1e-5
    record = plan_of(terms, multiplier=1e-3, norm=5.0, unit="record")  # whose parts the trainer has clipped
    what = round_of(terms, record, tmp_path / "record").run(vectors, [1000.0] * 3)
    assert abs(opened_by_a_survivor(what).mean.mean() * 3 - 3.0) < 0.01


# ---- one release a round


def test_another_attempt_carries_the_same_noise(tmp_path):
    terms = terms_of(3, 200)
    plan = plan_of(terms)
    vectors = [np.zeros(200, dtype=np.float32)] * 3
    first = round_of(terms, plan, tmp_path).run(vectors, [1000.0] * 3)
    second = round_of(dataclasses.replace(terms, attempt=1), plan, tmp_path).run(vectors, [1000.0] * 3)
    np.testing.assert_array_equal(opened_by_a_survivor(first).mean, opened_by_a_survivor(second).mean)
    assert first.result != second.result
    third = round_of(dataclasses.replace(terms, round=1), plan, tmp_path).run(vectors, [1000.0] * 3)
    assert not np.array_equal(opened_by_a_survivor(first).mean, opened_by_a_survivor(third).mean)
    assert sorted(path.name[:6] for path in (tmp_path / "0").iterdir()) == ["noised", "opened"]  # no older round's


def test_a_sum_over_other_parties_is_not_opened_in_a_round_that_had_one(tmp_path):
    """Both would carry the same noise: their difference is one party's update with its own share alone."""
    terms, vectors, weights = terms_of(4, 200), [np.zeros(200, dtype=np.float32)] * 4, [1000.0] * 4
    plan = plan_of(terms, dropouts=1)
    first = round_of(terms, plan, tmp_path).run(vectors, weights)
    again = round_of(dataclasses.replace(terms, attempt=1), plan, tmp_path)
    with pytest.raises(WireError, match="sum over other parties was opened"):
        again.run(vectors, weights, {"submit": [3]})
    same = round_of(dataclasses.replace(terms, attempt=2), plan, tmp_path).run(vectors, weights)
    np.testing.assert_array_equal(opened_by_a_survivor(first).mean, opened_by_a_survivor(same).mean)
    later = round_of(dataclasses.replace(terms, round=1), plan, tmp_path).run(vectors, weights, {"submit": [3]})
    assert opened_by_a_survivor(later).parties == 3


def test_another_update_in_the_same_round_is_refused(tmp_path):
    terms = terms_of(3, 200)
    plan = plan_of(terms)
    zeros = [np.zeros(200, dtype=np.float32)] * 3
    round_of(terms, plan, tmp_path).run(zeros, [1000.0] * 3)
    again = round_of(dataclasses.replace(terms, attempt=1), plan, tmp_path)
    with pytest.raises(DataError, match="second release"):
        again.run([np.full(200, 0.01, dtype=np.float32)] * 3, [1000.0] * 3)


def test_what_is_kept_can_be_read_by_its_owner_alone_and_is_not_named_by_a_peer(tmp_path):
    terms = terms_of(3, 200, federation="../../etc")
    plan = plan_of(terms)
    round_of(terms, plan, tmp_path / "deep").run([np.zeros(200, dtype=np.float32)] * 3, [1000.0] * 3)
    (kept,) = (tmp_path / "deep" / "0").glob("noised-*")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(DataError):
        round_of(terms, plan, tmp_path / "deep").run([np.zeros(200, dtype=np.float32)] * 3, [1000.0] * 3)


def test_weights_are_equal_under_noise(tmp_path):
    terms = terms_of(3, 50)
    with pytest.raises(DataError, match="weight"):
        round_of(terms, plan_of(terms), tmp_path).run([np.zeros(50, dtype=np.float32)] * 3, [1000.0, 999.0, 1000.0])


def test_values_that_are_not_finite_are_refused(tmp_path):
    terms = terms_of(3, 50)
    vectors = [np.full(50, np.inf, dtype=np.float32)] * 3
    with pytest.raises(DataError, match="not finite"):
        round_of(terms, plan_of(terms), tmp_path).run(vectors, [1000.0] * 3)
    assert not (tmp_path / "0").exists()


def test_a_party_with_another_plan_is_not_of_the_round(tmp_path):
    terms = terms_of(3, 50)
    known = identities(3)
    one = MaskSealer(terms, pairs()[0], known, noise=plan_of(terms), noiser=Noiser(tmp_path))
    for other in (None, plan_of(terms, multiplier=1.0), plan_of(terms, delta=1e-6), plan_of(terms, unit="record")):
        sealer = MaskSealer(terms, pairs()[1], known, noise=other, noiser=Noiser(tmp_path))
        third = MaskSealer(terms, pairs()[2], known, noise=plan_of(terms), noiser=Noiser(tmp_path))
        adverts = dict(zip(terms.parties, (m.advertise() for m in (one, sealer, third)), strict=True))
        with pytest.raises(WireError, match="signature"):
            one.share(adverts)


# ---- what it promises


@pytest.mark.parametrize(
    ("multiplier", "rounds", "parties", "colluders", "neighbours"),
    [(1.0, 1, 3, 0, "replace one"), (5.0, 10, 6, 4, "zero out one"), (10.0, 50, 5, 1, "replace one")],
)
def test_epsilon_is_that_of_the_accountant(multiplier, rounds, parties, colluders, neighbours):
    """PLD counts on a lattice and is a little above; the closed form is exact for Gaussians without sampling."""
    terms = terms_of(parties, 1000)
    plan = plan_of(terms, multiplier=multiplier, rounds=rounds, colluders=colluders, neighbours=neighbours)
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(plan.smallest_noise / plan.sensitivity), rounds
    )
    expected = pld.PLDAccountant().compose(event).get_epsilon(1e-5)
    assert plan.epsilon() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert plan.epsilon(1) <= plan.epsilon()


def test_the_noise_of_the_field_notes():
    """Ten releases at five times the sensitivity: 2.594; fifty at ten: 2.943."""
    for multiplier, rounds, expected in ((5.0, 10, 2.594), (10.0, 50, 2.943)):
        plan = plan_of(terms_of(4, 1000), multiplier=multiplier, rounds=rounds)
        assert plan.epsilon() == pytest.approx(expected, abs=1e-3)


def test_a_plan_from_an_epsilon_keeps_it():
    for epsilon in (0.5, 2.0, 8.0):
        plan = plan_of(terms_of(6, 1000), multiplier=None, epsilon=epsilon, colluders=2, rounds=20)
        assert 0.99 * epsilon < plan.epsilon() <= epsilon * (1 + 1e-9)


def test_the_claim_names_every_part():
    plan = plan_of(terms_of(6, 1000), colluders=2, dropouts=1, rounds=20)
    claim = plan.claim()
    for part in ("epsilon", "delta 1e-05", "20 sums", "unit: one party", "replace one", "2 of the 6", "1 dropouts"):
        assert part in claim
    assert "record's part" in dataclasses.replace(plan, unit="record").claim()


def test_rounding_counts_towards_the_sensitivity():
    wide, narrow = plan_of(terms_of(6, 10**6)), plan_of(terms_of(6, 100))
    assert wide.sensitivity - 2.0 == pytest.approx(wide.step * 1000, rel=1e-3)
    assert 2.0 < narrow.sensitivity < wide.sensitivity < 2.001


def test_there_is_room_for_the_noise_and_a_full_sum():
    terms = terms_of(10, 10**6)
    plan = plan_of(terms, colluders=4, dropouts=3, norm=10.0)
    grid = grid_for(terms, plan)
    assert grid.levels * 10 + 12 * plan.sigma * math.sqrt(10) <= (2**32 - 1) // 2
    assert grid.step == pytest.approx(plan.step)


@pytest.mark.parametrize(
    "changes",
    [{"norm": 0.0}, {"norm": math.inf}, {"rounds": 0}, {"delta": 0.0}, {"delta": 1.0}, {"multiplier": -1.0},
     {"multiplier": math.nan}, {"colluders": 5}, {"colluders": 2, "dropouts": 3}, {"colluders": -1},
     {"multiplier": None}, {"epsilon": 1.0}, {"multiplier": 1e30}, {"multiplier": 1e-12, "norm": 1e-6},
     {"unit": "token"}, {"neighbours": "both"}],
)  # fmt: skip
def test_plans_that_make_no_sense_are_refused(changes):
    with pytest.raises(UsageError):
        plan_of(terms_of(5, 100), **changes)


def test_a_plan_is_for_its_terms_and_its_rounds(tmp_path):
    terms = terms_of(3, 50)
    plan = plan_of(terms)
    for other in (terms_of(4, 50), terms_of(3, 51), terms_of(3, 50, clip=0.4), terms_of(3, 50, round=5)):
        with pytest.raises(UsageError, match="planned"):
            MaskSummer(other, noise=plan)
    with pytest.raises(UsageError, match="keep"):
        MaskSealer(terms, pairs()[0], identities(3), noise=plan)


# ---- the noise itself


def test_wide_noise_has_its_sigma():
    for sigma in (5000.0, 1e5, 3e7):
        values = draw(sigma, 100_000)
        assert within(values.std(), sigma, len(values))
        assert abs(values.mean()) < 6 * sigma / math.sqrt(len(values))
        assert stats.kstest(values / sigma, "norm").pvalue > 1e-6


def test_wide_noise_falls_on_every_residue():
    """A multiple of the coarse part alone would fall on one in 256: what is below would leak."""
    values = draw(2e6, 200_000)
    for modulus in (2, 3, 256):
        assert stats.chisquare(np.bincount(values % modulus, minlength=modulus)).pvalue > 1e-6


def test_a_sum_of_multiples_is_a_discrete_gaussian():
    """Of the same kind as in `draw`, but small enough to be computed: m = 4, tau = 3.4 instead of 7.9."""
    multiple, coarse, fine = 4, 8.0, 15.0
    reach = np.arange(-400, 401)

    def mass(sigma, at):
        weights = np.exp(-(at.astype(np.float64) ** 2) / (2 * sigma * sigma))
        return weights / weights.sum()

    mixed = np.zeros(801)
    for y, probability in zip(reach, mass(coarse, reach), strict=True):
        if abs(y) <= 80:
            shifted = reach - multiple * y
            mixed += probability * np.where(
                np.abs(shifted) <= 200, mass(fine, reach)[np.clip(shifted + 400, 0, 800)], 0
            )
    whole = mass(math.hypot(multiple * coarse, fine), reach)
    tau = coarse * fine / math.hypot(multiple * coarse, fine)
    middle = slice(250, 551)
    assert np.abs(mixed[middle] / whole[middle] - 1).max() < 3 * math.exp(-2 * math.pi**2 * tau**2) + 1e-9


@given(st.floats(LARGEST_SIGMA * (1 + 1e-9), 2.0**36))
def test_the_parts_add_up_and_are_wide_enough(sigma):
    coarse, fine = parts(sigma)
    assert math.hypot(256 * coarse, fine) == pytest.approx(sigma)
    assert coarse * fine / sigma > 7.9


def test_noise_beyond_the_range_is_refused():
    for sigma in (2.0**37, math.nan, math.inf):
        with pytest.raises(UsageError):
            draw(sigma, 1)
