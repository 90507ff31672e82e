"""Sends of one row are found to be that, without any truth: how precisely, and what averaging them is worth."""

from __future__ import annotations

import itertools

import pytest
import torch

from splitfl.audit.linking import linked, releases
from splitfl.audit.view import Noise, Sent
from splitfl.privacy.mechanisms import DChi, Gauss
from tests.audit.made import Made, make


def pairs(groups):
    return {pair for group in groups for pair in itertools.combinations(group, 2)}


def precision_and_recall(made: Made, sent: tuple[Sent, ...] | None = None) -> tuple[float, float]:
    found = pairs(linked(sent or made.sent, made.noise))
    rows = {row.number: row.row for row in made.truth}
    true = {pair for pair in itertools.combinations(sorted(rows), 2) if rows[pair[0]] == rows[pair[1]]}
    right = found & true
    return len(right) / max(1, len(found)), len(right) / len(true)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return make(tmp_path_factory.mktemp("noisy"), rows=24, epochs=3, bottom=1, hidden=Gauss(clip=100, sigma=0.3))


@pytest.mark.slow
def test_three_epochs_with_fresh_noise_are_linked(noisy):
    precision, recall = precision_and_recall(noisy)
    assert precision >= 0.98
    assert recall >= 0.98


@pytest.mark.slow
def test_every_number_is_in_one_group(noisy):
    numbers = [number for group in linked(noisy.sent, noisy.noise) for number in group]
    assert sorted(numbers) == [each.number for each in noisy.sent]


@pytest.mark.slow
def test_the_order_of_the_traffic_is_not_used(noisy):
    """An attacker that grouped by place in the epoch would find nothing in an order of its own."""
    order = torch.randperm(len(noisy.sent), generator=torch.Generator().manual_seed(1)).tolist()
    assert precision_and_recall(noisy, tuple(noisy.sent[each] for each in order)) == precision_and_recall(noisy)


@pytest.mark.slow
def test_the_mean_is_nearer_to_the_truth_by_the_root_of_three(noisy, tmp_path):
    clean = make(tmp_path, rows=24, bottom=1)
    truth = {row.row: sent.hidden for row, sent in zip(clean.truth, clean.sent, strict=True)}
    errors = []
    for release in releases(noisy.sent, noisy.noise):
        away = release.hidden - truth[noisy.truth[release.numbers[0]].row]
        errors.append((float(away.std()), len(release.numbers), release.variance**0.5))
    for found, count, claimed in errors:
        assert count == 3
        assert claimed == pytest.approx(0.3 / 3**0.5)
        assert found == pytest.approx(claimed, rel=0.05)


@pytest.mark.slow
def test_a_bottom_that_is_being_tuned_does_not_hide_that_a_row_came_again(tmp_path):
    made = make(tmp_path, rows=12, epochs=2, tuning=True)
    precision, recall = precision_and_recall(made)
    assert precision == 1
    assert recall >= 0.95


@pytest.mark.slow
def test_metric_noise_of_unknown_size_is_linked_too(tmp_path):
    made = make(tmp_path, rows=24, epochs=2, bottom=0, hidden=DChi(eta=2500.0))
    precision, recall = precision_and_recall(made)
    assert precision >= 0.9
    assert recall >= 0.9


@pytest.mark.slow
def test_rows_that_crossed_once_stay_alone(tmp_path):
    made = make(tmp_path, rows=24, bottom=1, hidden=Gauss(clip=100, sigma=0.3))
    assert all(len(group) == 1 for group in linked(made.sent, made.noise))


def test_two_rows_of_one_step_are_never_one_row():
    hidden = torch.ones(5, 4)
    sent = [Sent(number=n, step=n // 2, place=n % 2, training=True, hidden=hidden) for n in range(4)]
    assert all(len({number // 2 for number in group}) == len(group) for group in linked(sent))


def test_the_same_numbers_sent_again_count_once():
    """A cached or repeated release brings nothing new: its noise must not be believed to be smaller."""
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    sent = [Sent(number=n, step=n, place=0, training=True, hidden=hidden) for n in range(3)]
    (release,) = releases(sent, Noise(name="gauss", sigma=0.5))
    assert release.numbers == (0, 1, 2)
    assert release.variance == pytest.approx(0.25)
    assert torch.equal(release.hidden, hidden)


def test_no_traffic_has_no_groups():
    assert linked(()) == ()
