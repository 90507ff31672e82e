"""Labels from gradients: first where nothing defends them, then where noise does, and of classifiers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from splitfl.audit.attacks.grad_decode import ATTACKS, UNNAMED, leak_auc
from splitfl.audit.top import solve
from splitfl.audit.view import Knowledge
from splitfl.privacy.mechanisms import GradientGauss
from tests.audit.made import make

BY_NAME = {attack.name: attack for attack in ATTACKS}


def answers(made, guesses):
    """Share of the labels that were named, and of the positions of which it was told rightly whether they have one."""
    right = labels = told = positions = 0
    for row in made.truth:
        wanted = row.labels.clone()
        wanted[0] = -100
        real, found = wanted != -100, guesses.answers[row.number]
        right += int((found == wanted)[real].sum())
        told += int(((found != -100) == real).sum())
        labels, positions = labels + int(real.sum()), positions + len(wanted)
    return right / labels, told / positions


def test_gmres_solves_what_is_near_the_identity():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(50) + 0.05 * torch.randn(50, 50, generator=generator)
    right = torch.randn(50, generator=generator)
    rough, fine = solve(lambda x: matrix @ x, right, steps=(2, 40))
    exact = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(fine, exact, rtol=1e-3, atol=1e-3)
    assert (rough - exact).norm() > 10 * (fine - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("top", [0, 1])
def test_labels_are_read_off_an_undefended_gradient(tmp_path, top):
    made = make(tmp_path, top=top, rows=2, batch=2, max_length=64)
    named, told = answers(made, BY_NAME["grad-decode"].run(made.view(Knowledge.BASE)))
    assert named >= 0.95
    assert told >= 0.95


@pytest.mark.slow
def test_noise_on_gradients_hides_labels_and_where_they_are(tmp_path):
    made = make(tmp_path, top=0, rows=2, batch=2, max_length=64, gradient=GradientGauss(clip=0.001, sigma=0.01))
    named, told = answers(made, BY_NAME["grad-decode"].run(made.view(Knowledge.BASE)))
    assert named <= 0.05
    assert told <= 0.8


@pytest.mark.slow
def test_zero_rows_tell_where_the_answer_begins(tmp_path):
    made = make(tmp_path, top=0, rows=2, batch=2, max_length=64)
    guesses = BY_NAME["grad-zero"].run(made.view(Knowledge.BASE))
    named, told = answers(made, guesses)
    assert told == 1.0
    assert named == 0.0
    assert {int(each) for found in guesses.answers.values() for each in found} == {UNNAMED, -100}


@pytest.mark.slow
def test_matching_finds_labels_of_a_small_model(tmp_path):
    made = make(tmp_path, model="llama", bottom=2, top=1, rows=2, batch=2)
    view = made.view(Knowledge.EXACT, effort="quick")
    named, _ = answers(made, BY_NAME["grad-match"].run(view))
    assert named >= 0.3  # of 97 tokens
    blind = [dataclasses.replace(sent, gradient=torch.randn(sent.gradient.shape)) for sent in made.sent]
    guessed, _ = answers(made, BY_NAME["grad-match"].run(dataclasses.replace(view, sent=tuple(blind))))
    assert guessed < named - 0.2


@pytest.mark.parametrize("top", [0, 1])
def test_the_class_of_a_row_follows_from_its_gradient(tmp_path, top):
    made = make(tmp_path, model="bert", bottom=2, top=top, rows=9, batch=3)
    guesses = BY_NAME["label-enumerate"].run(made.view(Knowledge.BASE))
    assert [guesses.classes[row.number] for row in made.truth] == [row.labels for row in made.truth]
    noisy = make(tmp_path / "noisy", model="bert", bottom=2, top=top, rows=9, batch=3,
                 gradient=GradientGauss(clip=0.001, sigma=0.1))  # fmt: skip
    guesses = BY_NAME["label-enumerate"].run(noisy.view(Knowledge.BASE))
    assert sum(guesses.classes[row.number] == row.labels for row in noisy.truth) < 9


def test_direction_and_norm_are_scored_batch_by_batch(tmp_path):
    made = make(tmp_path, model="bert", bottom=2, top=1, rows=12, batch=6)
    classes = {row.number: int(row.labels == 1) for row in made.truth}
    batches = {sent.number: sent.step for sent in made.sent}
    for name in ("label-norm", "label-direction"):
        scores = BY_NAME[name].run(made.view(Knowledge.BASE)).scores
        assert scores.keys() == classes.keys()
        areas = leak_auc(scores, classes, batches)
        assert len(areas) == 2
        assert all(0.5 <= area <= 1 for area in areas)
    assert leak_auc({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0, 1: 0, 2: 1}, {0: 0, 1: 0, 2: 0}) == [1.0]
    assert leak_auc({0: 1.0, 1: 2.0}, {0: 1, 1: 1}, {0: 0, 1: 0}) == []
