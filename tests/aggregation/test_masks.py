"""Masked sums: exact whatever happens, and opened once, over one set of parties, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from splitfl.aggregation import mask_blobs, shamir
from splitfl.aggregation.hidden import HiddenSealer, HiddenSummer
from splitfl.aggregation.identity import signing_key
from splitfl.aggregation.mask_blobs import Advert, threshold
from splitfl.aggregation.mask_sums import MaskSummer
from splitfl.aggregation.masks import MaskSealer
from splitfl.aggregation.sealed import KEY, SIGNATURE, signed
from splitfl.aggregation.streams import add_streams
from splitfl.errors import DataError, InternalError, PeerError, UsageError, WireError
from tests.aggregation.rounds_in_memory import Round, identities, pairs, terms_of, updates

D = 20
KINDS = {"mask": (MaskSealer, MaskSummer), "mask+hidden": (HiddenSealer, HiddenSummer)}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def round_of(parties, kind="mask", *, terms=None, **more) -> Round:
    """A round whose parties remember what they masked."""
    sealer, summer = KINDS[kind]

    class Remembering(sealer):
        def _encode(self, vector, weight, ring):
            super()._encode(vector, weight, ring)
            self.encoded = ring.copy()

    terms, known = terms or terms_of(parties, D), identities(parties)
    members = {keys.public.decode(): Remembering(terms, keys, known, **more) for keys in pairs()[:parties]}
    return Round(members, summer(terms, known, **more))


def numbers_of(blob, count=D + 6, offset=0):
    return np.frombuffer(blob, dtype="<u4", count=count, offset=offset)


def result_numbers(what, result=None):
    sealer = next(iter(what.sealers.values()))
    return numbers_of(result or what.result, offset=sealer._layout.result_head)


# ---- the sum


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), parties=st.integers(3, 8), hidden=st.booleans())
def test_the_sum_is_exact_for_any_order_weights_and_dropouts_or_there_is_none(data, parties, hidden):
    places = range(parties)
    stages = ("advertise", "share", "submit", "agree", "reveal")
    leaves = {place: data.draw(st.sampled_from([*[None] * 6, *stages])) for place in places}
    leave = {stage: [place for place in places if leaves[place] == stage] for stage in stages}
    weights = data.draw(st.lists(st.floats(0.01, 1000), min_size=parties, max_size=parties))
    order = data.draw(st.permutations(places))
    here = {stage: [p for p in places if leaves[p] not in stages[: stages.index(stage) + 1]] for stage in stages}
    needed = threshold(len(here["advertise"]), 3)
    enough = all(len(here[stage]) >= needed for stage in stages)
    what = round_of(parties, "mask+hidden" if hidden else "mask")
    vectors = updates(parties, D, seed=7)
    if not enough:
        with pytest.raises(WireError):
            what.run(vectors, weights, leave, order)
        return
    what.run(vectors, weights, leave, order)
    members = [list(what.sealers)[place] for place in here["submit"]]
    assert what.summer.survivors == tuple(sorted(members))
    exact = np.sum([what.sealers[party].encoded for party in members], axis=0, dtype=np.uint32)
    opener = what.sealers[list(what.sealers)[here["reveal"][0]]]
    np.testing.assert_array_equal(opener._opened(result_numbers(what)), exact)
    opened = opener.open(what.result)
    total = sum(weights[place] for place in here["submit"])
    expected = sum(weights[p] * np.clip(vectors[p], -0.5, 0.5).astype(np.float64) for p in here["submit"]) / total
    assert np.abs(opened.mean - expected).max() <= parties * opener.grid.step * 1000 / total + 1e-7
    assert opened.weight == pytest.approx(total)
    assert opened.parties == len(members)


def test_every_party_opens_the_same(kind):
    what = round_of(4, kind).run(updates(4, D), [1.0, 10.0, 100.0, 1000.0], {"submit": [2]})
    opened = [sealer.open(what.result) for party, sealer in what.sealers.items() if party in what.blobs]
    for other in opened[1:]:
        np.testing.assert_array_equal(other.mean, opened[0].mean)
        assert (other.weight, other.parties) == (opened[0].weight, opened[0].parties)


@pytest.mark.slow
def test_fifty_parties_of_whom_sixteen_vanish():
    leave = {"share": [0, 1], "submit": range(2, 10), "agree": [10, 11, 12], "reveal": [13, 14, 15]}
    what = round_of(50).run(updates(50, D), [1.0] * 50, leave)
    assert len(what.summer.survivors) == 40
    exact = np.sum([what.sealers[party].encoded for party in what.summer.survivors], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(result_numbers(what), exact)


@pytest.mark.parametrize("length", [1, 65_535, 65_530, 65_536 * 2 + 1])
def test_lengths_around_the_size_of_a_chunk(length):
    what = round_of(3, terms=terms_of(3, length)).run(updates(3, length), [1.0, 2.0, 3.0])
    exact = np.sum([sealer.encoded for sealer in what.sealers.values()], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(numbers_of(what.result, length + 6, what.summer._layout.result_head), exact)


def test_the_largest_values_do_not_wrap(kind):
    vectors = [np.full(D, 1e9, dtype=np.float32)] * 8
    what = round_of(8, kind).run(vectors, [1000.0] * 8)
    np.testing.assert_array_equal(what.sealers[what.summer.survivors[0]].open(what.result).mean, np.float32(0.5))


def test_a_submission_has_four_bytes_a_value_and_few_more():
    what = round_of(10).run(updates(10, D), [1.0] * 10, until="agree")
    assert {len(blob) for blob in what.blobs.values()} == {4 * (D + 6) + 5 * KEY + 2 * 2 + SIGNATURE}


# ---- what the coordinator sees


def chi_square(numbers) -> float:
    """Probability of bytes as uneven as these, if they were uniform."""
    return stats.chisquare(np.bincount(np.frombuffer(numbers.tobytes(), np.uint8), minlength=256)).pvalue


def test_submissions_look_uniform_and_have_nothing_in_common():
    length = 50_000
    vectors = [np.zeros(length, dtype=np.float32)] * 3
    seen = []
    for attempt in range(2):
        what = round_of(3, terms=terms_of(3, length, attempt=attempt)).run(vectors, [1.0] * 3, until="agree")
        seen += [numbers_of(blob, length) for blob in what.blobs.values()]
    for numbers in seen:
        assert chi_square(numbers) > 1e-6
    for one, other in itertools.combinations(seen, 2):
        assert chi_square(one - other) > 1e-6
        assert chi_square(one + other) > 1e-6


def test_pair_masks_cancel_and_self_masks_stay():
    """The sum of the submissions is still masked: by the self masks alone."""
    length = 50_000
    what = round_of(3, terms=terms_of(3, length)).run([np.zeros(length, np.float32)] * 3, [1.0] * 3, until="agree")
    total = np.sum([numbers_of(blob, length + 6) for blob in what.blobs.values()], axis=0, dtype=np.uint32)
    assert chi_square(total) > 1e-6
    add_streams(total, [(sealer._seed, -1) for sealer in what.sealers.values()])
    exact = np.sum([sealer.encoded for sealer in what.sealers.values()], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(total, exact)


def test_a_hidden_sum_is_noise_to_the_coordinator():
    length = 50_000
    terms = terms_of(3, length)
    what = round_of(3, "mask+hidden", terms=terms).run([np.zeros(length, np.float32)] * 3, [1.0] * 3)
    assert not HiddenSummer.opens
    with pytest.raises(InternalError, match="hidden"):
        what.summer.open(what.result)
    assert chi_square(numbers_of(what.result, length, what.summer._layout.result_head)) > 1e-6
    assert chi_square(what.summer._sum) > 1e-6
    assert not np.any(next(iter(what.sealers.values())).open(what.result).mean)


def test_what_the_coordinator_of_a_hidden_sum_gets_does_not_hold_the_group_key():
    what = round_of(4, "mask+hidden").run(updates(4, D), [1.0] * 4, {"submit": [1]})
    said = [*what.adverts.values(), *what.blobs.values(), *what.agreements.values(), *what.reveals.values()]
    said += [blob for blobs in what.shares.values() for blob in blobs.values()]
    for sealer in what.sealers.values():
        for secret in (sealer._group_key, sealer._contribution):
            assert not any(secret in blob for blob in said if secret)
    keys = {sealer._group_key for party, sealer in what.sealers.items() if party in what.blobs}
    assert len(keys) == 1
    assert len(keys.pop()) == KEY


def test_a_new_attempt_has_new_keys():
    one, two = (round_of(3).run(updates(3, D), [1.0] * 3, until="submit") for _ in range(2))
    for party in one.adverts:
        assert one.adverts[party] != two.adverts[party]


# ---- a coordinator that tells different parties different things


def test_a_second_set_of_survivors_is_never_signed():
    what = round_of(6).run(updates(6, D), [1.0] * 6, until="agree")
    parties = list(what.sealers)
    sealer = what.sealers[parties[1]]
    first = sealer.agree(parties[:5])
    with pytest.raises(WireError, match="second set"):
        sealer.agree(parties[1:])
    assert sealer.agree(parties[:5]) == first
    assert sealer.agree(parties[4::-1]) == first  # the same set in another order


def test_an_equivocating_coordinator_gets_nothing():
    """Two sets of five out of six: four parties would have to sign both."""
    what = round_of(6).run(updates(6, D), [1.0] * 6, until="agree")
    parties = list(what.sealers)
    one, two = parties[:5], parties[1:]
    signed_one = {party: what.sealers[party].agree(one) for party in one}
    signed_two = {parties[5]: what.sealers[parties[5]].agree(two)}
    for party in parties[1:5]:
        with pytest.raises(WireError):
            what.sealers[party].agree(two)
    stranger = what.sealers[parties[5]]
    with pytest.raises(WireError, match="1 of 5 survivors signed"):
        stranger.reveal(two, signed_two)
    with pytest.raises(WireError, match="signature"):  # signatures under the other set do not count
        stranger.reveal(two, signed_two | {party: signed_one[party] for party in parties[1:5]})
    with pytest.raises(WireError, match="did not agree"):
        stranger.reveal(one, signed_one)
    for party in one:
        what.sealers[party].reveal(one, signed_one)
        with pytest.raises(WireError, match="did not agree"):
            what.sealers[party].reveal(two, signed_two)


@pytest.mark.parametrize("parties", range(3, 51))
def test_two_sets_need_more_than_a_third_of_the_parties_to_sign_both(parties):
    needed = threshold(parties, 3)
    assert needed <= parties
    assert 2 * needed - parties > parties / 3
    assert needed > parties / 2


def test_a_reveal_gives_one_kind_of_share_for_each_party_and_what_opened_it_is_gone():
    what = round_of(6).run(updates(6, D), [1.0] * 6, {"submit": [2]}, until="finish")
    parties = list(what.sealers)
    group = what.summer._group
    for party, blob in what.reveals.items():
        sealer, body = what.sealers[party], blob[:-SIGNATURE]
        reveal = sealer._layout.read_reveal(body, group.cohort, what.summer.survivors)
        assert list(reveal.dropped_keys) == [parties[2]]
        with pytest.raises(InternalError, match="given up"):
            sealer._secrets()
        assert sealer.reveal(what.summer.survivors, what.agreements) == blob
    usable = what.summer._usable(what.reveals, group, what.summer.survivors)
    for about in parties:
        shares = {group.roster.index(p) + 1: usable[p].shares[about] for p in list(usable)[:5]}
        secret = shamir.combine(shares)
        sealer = what.sealers[about]
        if about == parties[2]:
            assert secret == sealer._mask_key.private_bytes_raw()
            assert secret != sealer._seed
        else:
            assert mask_blobs.commitment(secret) == sealer._adverts[about].commitment
            private = X25519PrivateKey.from_private_bytes(secret)
            assert private.public_key().public_bytes_raw() != sealer._adverts[about].mask_key


def test_a_party_submits_once():
    what = round_of(3).run(updates(3, D), [1.0] * 3, until="agree")
    party, sealer = next(iter(what.sealers.items()))
    with pytest.raises(InternalError, match="twice"):
        sealer.submit(updates(1, D)[0], 1.0, what.adverts, what.inbox(party))


def test_survivors_are_of_the_cohort_enough_and_include_oneself():
    what = round_of(6).run(updates(6, D), [1.0] * 6, {"submit": [5]}, until="agree")
    parties = list(what.sealers)
    fresh = what.sealers[parties[0]]
    for wrong in (parties[:4], parties[1:6], [], [*parties[:5], "x" * 40]):
        with pytest.raises(WireError, match="survivors"):
            fresh.agree(wrong)
    with pytest.raises(InternalError):
        what.sealers[parties[5]].agree(parties[:5])


def test_a_changed_roster_or_cohort_is_refused():
    what = round_of(6).run(updates(6, D), [1.0] * 6, until="submit")
    parties = list(what.sealers)
    sealer, adverts = what.sealers[parties[0]], dict(what.adverts)
    fewer = {party: adverts[party] for party in parties[:5]}
    with pytest.raises(WireError, match="changed the list"):
        sealer.share(fewer)
    with pytest.raises(WireError, match="changed the list"):
        sealer.submit(updates(1, D)[0], 1.0, fewer, what.inbox(parties[0]))
    assert sealer.share(adverts) == what.shares[parties[0]]
    # one party is told of a smaller cohort: the coordinator's own software refuses to add that
    for place, party in enumerate(parties):
        inbox = what.inbox(party)
        if place == 3:
            inbox.pop(parties[5])
        what.blobs[party] = what.sealers[party].submit(updates(1, D)[0], 1.0, adverts, inbox)
    what.summer.accept(parties[0], what.blobs[parties[0]])
    with pytest.raises(WireError, match="other parties"):
        what.summer.accept(parties[3], what.blobs[parties[3]])
    # and one that added it nevertheless gets no signatures together
    agreed = {party: what.sealers[party].agree(parties[:5]) for party in parties[:5]}
    with pytest.raises(WireError, match="signature"):
        what.sealers[parties[0]].reveal(parties[:5], agreed)


# ---- who is who


def test_two_parties_are_refused(kind):
    sealer, summer = KINDS[kind]
    for make in (lambda: sealer(terms_of(2), pairs()[0], identities(2)), lambda: summer(terms_of(2))):
        with pytest.raises(UsageError, match="hides none"):
            make()
    with pytest.raises(UsageError, match="noise"):
        sealer(terms_of(2), pairs()[0], identities(2), allow_two=True)
    what = round_of(3, kind)
    adverts = {party: member.advertise() for party, member in list(what.sealers.items())[:2]}
    with pytest.raises(WireError, match="2 parties advertised"):
        next(iter(what.sealers.values())).share(adverts)


def test_who_is_not_of_the_round_or_not_pinned_is_refused():
    with pytest.raises(UsageError, match="not of the round"):
        MaskSealer(terms_of(3), pairs()[4], identities(5))
    with pytest.raises(WireError, match="not known here"):
        MaskSealer(terms_of(3), pairs()[0], identities(2))


def test_an_advert_by_another_identity_is_refused():
    what = round_of(4)
    parties, known = list(what.sealers), identities(4)
    adverts = {party: sealer.advertise() for party, sealer in what.sealers.items()}
    posing = MaskSealer(terms_of(4), pairs()[1], known)
    posing._identity = signing_key(pairs()[10])
    own = Advert(*(bytes([n]) * KEY for n in (9, 9, 9)))
    for forged in (
        signed(posing._identity, b"advertise", posing.binding, parties[1], own.body()),
        adverts[parties[2]],
        adverts[parties[1]][:-1],
        b"",
        MaskSealer(terms_of(4, attempt=1), pairs()[1], known).advertise(),
        MaskSealer(terms_of(4, round=1), pairs()[1], known).advertise(),
        MaskSealer(terms_of(4, federation="1" * 32), pairs()[1], known).advertise(),
        HiddenSealer(terms_of(4), pairs()[1], known).advertise(),
    ):
        with pytest.raises(WireError):
            what.sealers[parties[0]].share(adverts | {parties[1]: forged})
    with pytest.raises(WireError, match="own"):
        what.sealers[parties[0]].share({party: adverts[party] for party in parties[1:]})
    with pytest.raises(WireError, match="not of the round"):
        what.sealers[parties[0]].share(adverts | {"x" * 40: adverts[parties[1]]})
    what.sealers[parties[0]].share(adverts)


def test_a_key_of_low_order_is_refused():
    """With it, the mask between two parties would be known to everybody."""
    what = round_of(3)
    parties = list(what.sealers)
    adverts = {party: sealer.advertise() for party, sealer in what.sealers.items()}
    bad, own = what.sealers[parties[1]], adverts[parties[1]]
    for keys in ((bytes(KEY), own[KEY : 2 * KEY]), (own[:KEY], bytes(KEY))):
        body = Advert(*keys, bytes(KEY)).body()
        adverts[parties[1]] = signed(bad._identity, b"advertise", bad.binding, parties[1], body)
        victim = MaskSealer(terms_of(3), pairs()[0], identities(3))
        with pytest.raises(WireError, match="is not one") as caught:
            victim.share(adverts | {parties[0]: victim.advertise()})
        assert mask_blobs.name_all([parties[1]]) in str(caught.value)


# ---- blobs that are not what they should be


def flips(blob, count, seed=0):
    rng = np.random.default_rng(seed)
    for place in rng.choice(len(blob), size=min(count, len(blob)), replace=False):
        changed = bytearray(blob)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


def test_changed_submissions_are_refused_and_leave_the_sum_alone():
    what = round_of(4)
    what.run(updates(4, D), [1.0] * 4, until="agree")
    fresh = MaskSummer(what.summer.terms, identities(4))
    parties = list(what.sealers)
    fresh.accept(parties[0], what.blobs[parties[0]])
    before = fresh._sum.copy()
    blob = what.blobs[parties[1]]
    for changed in (*flips(blob, len(blob)), b"", blob[:-1], blob + b"\0", what.blobs[parties[2]], bytes(len(blob))):
        with pytest.raises(WireError):
            fresh.accept(parties[1], changed)
    with pytest.raises(WireError, match="already"):
        fresh.accept(parties[0], what.blobs[parties[0]])
    with pytest.raises(WireError, match="not of this round"):
        fresh.accept("x" * 40, blob)
    np.testing.assert_array_equal(fresh._sum, before)
    assert fresh.survivors == (parties[0],)


@pytest.mark.parametrize("change", [{"round": 1}, {"attempt": 1}, {"federation": "1" * 32}, {"layout": "other"}])
def test_submissions_reveals_and_results_of_another_time_are_refused(change):
    what = round_of(3).run(updates(3, D), [1.0] * 3)
    later = round_of(3, terms=dataclasses.replace(what.summer.terms, **change)).run(updates(3, D), [1.0] * 3)
    party = next(iter(what.sealers))
    with pytest.raises(WireError):
        MaskSummer(later.summer.terms, identities(3)).accept(party, what.blobs[party])
    with pytest.raises(WireError, match="another round"):
        later.sealers[party].open(what.result)
    again = round_of(3, terms=later.summer.terms).run(updates(3, D), [1.0] * 3, until="finish")
    with pytest.raises(WireError, match="0 of 3"):
        again.summer.finish(what.reveals)
    waiting = round_of(3, terms=later.summer.terms).run(updates(3, D), [1.0] * 3, until="reveal")
    with pytest.raises(WireError, match="signature"):
        waiting.sealers[party].reveal(waiting.summer.survivors, what.agreements)


def test_changed_reveals_are_left_out_or_end_the_round():
    what = round_of(6).run(updates(6, D), [1.0] * 6, {"submit": [5]}, until="finish")
    parties = list(what.reveals)
    for changed in (*flips(what.reveals[parties[0]], 30), b"", what.reveals[parties[1]]):
        with pytest.raises(WireError, match=r"4 of 5 survivors.*wrong"):
            what.summer.finish(what.reveals | {parties[0]: changed})
    with pytest.raises(WireError, match="4 of 5 survivors"):
        what.summer.finish({party: what.reveals[party] for party in parties[1:]})
    with pytest.raises(WireError, match="0 of 5"):
        what.summer.finish({})
    result = what.summer.finish(what.reveals)  # none of that has spoilt it
    assert what.summer.open(result).parties == 5
    with pytest.raises(InternalError, match="twice"):
        what.summer.finish(what.reveals)
    with pytest.raises(WireError, match="after the sum"):
        what.summer.accept(list(what.sealers)[5], b"")


def lying_reveal(what, liar, about):
    """The reveal of a party that gives a false share, and signs it."""
    sealer, group = what.sealers[liar], what.summer._group
    honest = sealer._layout.read_reveal(what.reveals[liar][:-SIGNATURE], group.cohort, what.summer.survivors)
    false = dataclasses.replace(honest, shares=honest.shares | {about: (7).to_bytes(shamir.SHARE, "little")})
    body = sealer._layout.write_reveal(false, group.cohort)
    return signed(sealer._identity, b"reveal", sealer.binding, liar, body)


def test_a_false_share_is_noticed_and_done_without_if_there_are_more():
    what = round_of(6).run(updates(6, D), [1.0] * 6, until="finish")
    parties = list(what.reveals)
    exact = np.sum([sealer.encoded for sealer in what.sealers.values()], axis=0, dtype=np.uint32)
    false = lying_reveal(what, parties[0], parties[3])
    without_spare = {party: what.reveals[party] for party in parties[:5]} | {parties[0]: false}
    with pytest.raises(WireError, match="do not fit together") as caught:
        what.summer.finish(without_spare)
    assert mask_blobs.name_all([parties[3]]) in str(caught.value)
    what.result = what.summer.finish(what.reveals | {parties[0]: false})
    np.testing.assert_array_equal(result_numbers(what), exact)


@pytest.mark.parametrize("about_a_dropout", [False, True])
def test_a_party_that_deals_false_shares_ends_the_round_with_its_name(about_a_dropout, monkeypatch):
    what = round_of(6)
    parties = list(what.sealers)
    liar = what.sealers[parties[2]]
    honest = liar.share

    def share(adverts):
        monkeypatch.setattr("splitfl.aggregation.masks.split", lambda secret, n, t: shamir.split(bytes(KEY), n, t))
        try:
            return honest(adverts)
        finally:
            monkeypatch.undo()

    liar.share = share
    leave = {"submit": [2]} if about_a_dropout else {}
    with pytest.raises(WireError, match="do not fit together") as caught:
        what.run(updates(6, D), [1.0] * 6, leave)
    assert mask_blobs.name_all([parties[2]]) in str(caught.value)
    assert what.result == b""


def test_a_wrong_share_blob_is_refused():
    what = round_of(3).run(updates(3, D), [1.0] * 3, until="submit")
    parties = list(what.sealers)
    sealer, inbox = what.sealers[parties[0]], what.inbox(parties[0])
    vector = updates(1, D)[0]
    good = inbox[parties[1]]
    for wrong in (*flips(good, 20), b"", good[:-1], inbox[parties[2]], what.shares[parties[1]][parties[2]]):
        with pytest.raises(WireError, match="cannot be opened"):
            sealer.submit(vector, 1.0, what.adverts, inbox | {parties[1]: wrong})
    with pytest.raises(WireError, match="did not advertise"):
        sealer.submit(vector, 1.0, what.adverts, inbox | {"x" * 40: good})
    with pytest.raises(WireError, match="Shares of 2"):
        sealer.submit(vector, 1.0, what.adverts, {parties[1]: good})
    assert len(sealer.submit(vector, 1.0, what.adverts, inbox)) > 4 * D


def test_a_party_that_masks_something_else_spoils_the_round_and_nothing_more(kind):
    """Numbers that are on no grid: no result goes out, or, where the coordinator cannot look, none is opened."""
    what = round_of(4, kind)
    rng = np.random.default_rng(0)
    liar = next(iter(what.sealers.values()))
    encode = liar._encode

    def poison(vector, weight, ring):
        encode(vector, weight, ring)
        ring[:] = rng.integers(0, 2**32, len(ring), dtype=np.uint32)

    liar._encode = poison
    if kind == "mask":
        with pytest.raises(WireError, match="not the sum of 4"):
            what.run(updates(4, D), [1.0] * 4)
        return
    what.run(updates(4, D), [1.0] * 4)
    for sealer in what.sealers.values():
        with pytest.raises(WireError, match="not the sum of 4"):
            sealer.open(what.result)


def test_a_party_that_sends_more_than_the_clip_is_noticed_in_the_mean():
    what = round_of(4)
    liar = next(iter(what.sealers.values()))
    encode = liar._encode

    def poison(vector, weight, ring):
        encode(vector, weight, ring)
        ring[3] = np.uint32(2**31 - 1)

    liar._encode = poison
    with pytest.raises(WireError, match="beyond the clip"):
        what.run(updates(4, D), [1.0] * 4)


def test_a_changed_result_is_refused_where_it_can_be_seen():
    what = round_of(3).run(updates(3, D), [1.0] * 3)
    sealer = next(iter(what.sealers.values()))
    head = sealer._layout.result_head
    for wrong in (b"", what.result[:-1], what.result + b"\0", bytes(len(what.result))):
        with pytest.raises(WireError):
            sealer.open(wrong)
    for place in (0, KEY, head + 4 * D + 3, len(what.result) - 1):  # terms, survivors, weight's sign, check
        changed = bytearray(what.result)
        changed[place] ^= 0x80
        with pytest.raises(WireError):
            sealer.open(bytes(changed))
    early = round_of(3).run(updates(3, D), [1.0] * 3, until="agree")
    with pytest.raises(WireError, match="before this party agreed"):
        next(iter(early.sealers.values())).open(what.result)


def test_an_update_that_cannot_be_sent_is_refused_and_may_be_mended(kind):
    what = round_of(3, kind).run(updates(3, D), [1.0] * 3, until="submit")
    party, sealer = next(iter(what.sealers.items()))
    vector, inbox = updates(1, D)[0], what.inbox(party)
    wrong = vector.copy()
    wrong[3] = np.nan
    for bad, weight in (
        (wrong, 1.0),
        (vector[:-1], 1.0),
        (vector.astype(np.float64), 1.0),
        (vector, 0.0),
        (vector, 1001),
    ):
        with pytest.raises(DataError):
            sealer.submit(bad, weight, what.adverts, inbox)
    assert sealer.submit(vector, 1.0, what.adverts, inbox)


def test_errors_and_printing_show_no_secret():
    what = round_of(3).run(updates(3, D), [1.0] * 3, until="agree")
    for sealer in what.sealers.values():
        text = repr(sealer) + str(sealer)
        assert sealer._seed.hex() not in text
        assert str(sealer._seed) not in text


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_without_a_crash(blob):
    what = _said()
    party = next(iter(what.sealers))
    for call in (
        lambda: MaskSummer(what.summer.terms).accept(party, blob),
        lambda: what.sealers[party].open(blob),
        lambda: what.summer.finish({party: blob}),
        lambda: round_of(3).sealers[party].share({party: blob}),
    ):
        with pytest.raises(PeerError):
            call()


_kept: list[Round] = []


def _said() -> Round:
    if not _kept:
        _kept.append(round_of(3).run(updates(3, D), [1.0] * 3, until="finish"))
    return _kept[0]


# ---- memory


def test_the_coordinator_holds_one_sum_and_parties_one_update():
    length = 500_000
    what = round_of(6, terms=terms_of(6, length))
    what.sealers = {  # parties that do not remember what they masked
        party: MaskSealer(what.summer.terms, keys, identities(6))
        for party, keys in zip(what.sealers, pairs(), strict=False)
    }
    vector = np.zeros(length, dtype=np.float32)
    what.run([vector] * 6, [1.0] * 6, until="submit")
    tracemalloc.start()
    try:
        party = next(iter(what.sealers))
        first = what.sealers[party].submit(vector, 1.0, what.adverts, what.inbox(party))
        assert tracemalloc.get_traced_memory()[1] < 2.1 * len(first) + 3_000_000  # made once, returned as bytes once
        del first
    finally:
        tracemalloc.stop()
    blobs = {p: s.submit(vector, 1.0, what.adverts, what.inbox(p)) for p, s in list(what.sealers.items())[1:]}
    tracemalloc.start()
    try:
        for party, blob in blobs.items():
            what.summer.accept(party, blob)
        assert tracemalloc.get_traced_memory()[1] < 4 * length + 1_000_000
    finally:
        tracemalloc.stop()


# ---- the parts


@settings(max_examples=40, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), data=st.data(), holders=st.integers(1, 12))
def test_any_threshold_of_shares_gives_the_secret_back(secret, data, holders):
    needed = data.draw(st.integers(1, holders))
    shares = dict(enumerate(shamir.split(secret, holders, needed), start=1))
    assert {len(share) for share in shares.values()} == {shamir.SHARE}
    chosen = data.draw(st.permutations(list(shares)))[:needed]
    assert shamir.combine({holder: shares[holder] for holder in chosen}) == secret
    assume(needed > 1)
    fewer = {holder: shares[holder] for holder in chosen[1:]}
    with contextlib.suppress(WireError):
        assert shamir.combine(fewer) != secret


def test_fewer_shares_say_nothing():
    """A share of the smallest secret and one of the largest: neither is told from the other by its first byte."""
    counts = [np.zeros(256), np.zeros(256)]
    for count, secret in zip(counts, (bytes(32), b"\xff" * 32), strict=True):
        for _ in range(4000):
            count[shamir.split(secret, 3, 2)[0][0]] += 1
    for count in counts:
        assert stats.chisquare(count).pvalue > 1e-6


def test_the_prime_is_one():
    prime = shamir.PRIME
    odd, twos = prime - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 60):  # Miller and Rabin
        power = pow(base, odd, prime)
        chain = [power, *(power := power * power % prime for _ in range(twos - 1))]
        assert chain[0] == 1 or prime - 1 in chain


@pytest.mark.parametrize("share", [b"", bytes(32), b"\xff" * 33])
def test_malformed_shares_are_refused(share):
    with pytest.raises(WireError):
        shamir.combine({1: share, 2: bytes(33)})


@pytest.mark.parametrize("arguments", [(bytes(31), 3, 2), (bytes(32), 3, 4), (bytes(32), 3, 0)])
def test_splits_that_make_no_sense_are_refused(arguments):
    with pytest.raises(InternalError):
        shamir.split(*arguments)


def test_streams_are_aes_256_in_counter_mode():
    """Against single blocks: the counter starts at 2 and counts up, under a nonce of zeros."""
    key, count = bytes(range(32)), 200_000
    vector = np.zeros(count, dtype=np.uint32)
    add_streams(vector, [(key, 1)])
    blocks = b"".join(bytes(12) + number.to_bytes(4, "big") for number in range(2, 2 + count // 4))
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    np.testing.assert_array_equal(vector, np.frombuffer(encryptor.update(blocks), dtype=np.uint32))
    add_streams(vector, [(key, -1)])
    assert not vector.any()


def test_streams_of_keys_that_differ_in_one_bit_have_nothing_in_common():
    """The whole key counts, each bit of it."""
    for bit in range(0, 256, 17):
        one = np.zeros(20_000, dtype=np.uint32)
        add_streams(one, [(bytes(32), 1), ((1 << bit).to_bytes(32, "little"), -1)])
        assert chi_square(one) > 1e-6
