"""Controls that must be able to fail: each is shown an instrument that works and one that does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from splitfl.audit.controls import (
    SAME,
    check_negative,
    check_sensitivity,
    distance,
    hush,
    inject,
    make_twins,
    shuffle,
)
from splitfl.audit.intervals import Estimate
from splitfl.audit.scoring import Truth, name_of, score
from splitfl.audit.view import Guesses
from splitfl.errors import DataError
from splitfl.privacy.mechanisms import Gauss
from tests.audit.made import make


def estimate(value, width=0.02):
    return Estimate(value=value, low=value - width, high=value + width, records=40)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"), model="llama", bottom=1, top=1, rows=6, batch=3, steps=2)


@pytest.fixture(scope="module")
def noised(tmp_path_factory):
    mechanism = Gauss(clip=2.0, sigma=1.0, unit="record")
    folder = tmp_path_factory.mktemp("noised")
    return make(folder, model="llama", bottom=1, top=1, rows=6, batch=3, steps=2, hidden=mechanism)


def rows_of(made):
    return {each.number: each for each in made.truth}


def test_the_twin_of_undefended_traffic_is_that_traffic(plain):
    twins = make_twins(plain.kit, plain.sent, rows_of(plain), plain.adapter)
    assert distance(plain.sent, twins) < 1e-4
    for sent, twin in zip(plain.sent, twins, strict=True):
        assert torch.allclose(sent.hidden, twin.hidden, atol=1e-4)
        assert torch.allclose(sent.gradient, twin.gradient, atol=1e-5)


def test_the_twin_of_defended_traffic_is_far_from_it(noised):
    twins = make_twins(noised.kit, noised.sent, rows_of(noised), noised.adapter)
    assert distance(noised.sent, twins) > SAME


def test_another_adapter_makes_another_twin(plain):
    twins = make_twins(plain.kit, plain.sent, rows_of(plain), None)
    assert distance(plain.sent, twins) > 1e-3


def test_without_its_rows_there_is_no_twin(plain):
    with pytest.raises(DataError) as refused:
        make_twins(plain.kit, plain.sent, {}, plain.adapter)
    assert "no score of a defended run is reported" in str(refused.value)


def test_shuffled_targets_are_those_of_other_rows_and_alike_for_all_sends(plain):
    again = [dataclasses.replace(row, number=row.number + 6) for row in plain.truth]
    truth = Truth(rows=(*plain.truth, *again))
    shuffled = shuffle(truth, 0)
    assert sorted(map(name_of, shuffled.rows)) == sorted(map(name_of, truth.rows))
    targets = {}
    for row, other in zip(truth.rows, shuffled.rows, strict=True):
        assert (len(row.ids), row.ids.tolist()) != (len(other.ids), other.ids.tolist())
        assert targets.setdefault(name_of(row), other.ids.tolist()) == other.ids.tolist()


def test_reading_everything_scores_nothing_on_shuffled_targets(plain):
    guesses = Guesses(tokens={row.number: row.ids for row in plain.truth})
    truth = Truth(rows=plain.truth)
    assert score(guesses, truth, "tokens")["token recovery"].value == 1.0
    control = check_negative("perfect", "K3", score(guesses, shuffle(truth, 0), "tokens"))
    assert control.works


def test_an_attack_that_was_told_the_shuffled_targets_is_found_out(plain):
    shuffled = shuffle(Truth(rows=plain.truth), 0)
    told = Guesses(tokens={row.number: row.ids for row in shuffled.rows})
    assert not check_negative("told", "K3", score(told, shuffled, "tokens")).works


def test_scores_of_membership_are_a_coin_toss_on_shuffled_targets(plain):
    assert check_negative("m", "K1", {"AUC": estimate(0.51)}).works
    assert not check_negative("m", "K1", {"AUC": estimate(0.9)}).works


def test_a_leak_is_put_into_whole_records(plain):
    twice = [*plain.sent, *(dataclasses.replace(each, number=each.number + 6) for each in plain.sent)]
    rows = rows_of(plain) | {n + 6: dataclasses.replace(row, number=n + 6) for n, row in rows_of(plain).items()}
    ground = hush(twice, 0)
    mixed, leaked = inject(ground, twice, rows, share=0.5, seed=1)
    assert len(leaked) == 6
    assert {name_of(rows[n]) for n in leaked}.isdisjoint({name_of(rows[n]) for n in set(rows) - leaked})
    for each, base, real in zip(mixed, ground, twice, strict=True):
        assert torch.equal(each.hidden, real.hidden if each.number in leaked else base.hidden)


def test_hushed_traffic_has_the_shape_and_the_scale_and_nothing_else(plain):
    hushed = hush(plain.sent, 0)
    real, empty = torch.cat([s.hidden for s in plain.sent]), torch.cat([s.hidden for s in hushed])
    assert real.shape == empty.shape
    assert torch.allclose(real.std(), empty.std(), rtol=0.2)
    both = torch.nn.functional.cosine_similarity(real - real.mean(0), empty - real.mean(0), dim=-1)
    assert both.mean().abs() < 0.1


def test_a_rise_of_the_right_size_and_of_the_wrong_one():
    for found, works in ((0.30, True), (0.25, True), (0.10, False), (0.60, False)):
        control = check_sensitivity("a", "K3", ground=0.1, expected=0.3, mixed=estimate(found), share=0.25)
        assert control.works is works, found
    assert not check_sensitivity("a", "K3", ground=0.1, expected=0.1, mixed=estimate(0.1), share=0.25).works
