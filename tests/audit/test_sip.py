"""Learned inversion: reads undefended states, and less where noise or another bottom stands in between."""

from __future__ import annotations

import pytest
import torch

from splitfl.audit.attacks.sip import ATTACKS, coding_of, defended
from splitfl.audit.view import Knowledge, Noise
from splitfl.privacy.mechanisms import Gauss, Quantise
from tests.audit.made import CLINIC, make, random_rows, rows_of
from tests.families import VOCAB

SIP, NAMOE = ATTACKS


def aux(encoder=False):
    return tuple(tuple(row["input_ids"].tolist()) for row in random_rows(80, encoder=encoder, seed=9))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_undefended_states_are_read(tmp_path, family):
    made = make(tmp_path, model=family, bottom=1, top=1)
    guesses = SIP.run(made.view(Knowledge.EXACT, auxiliary=aux(), effort="quick"))
    assert made.share(guesses) >= 0.6
    assert made.shuffled(guesses) <= 0.15
    assert guesses.notes["random text"] == 0


def test_without_text_it_learns_from_random_tokens_and_says_so(tmp_path):
    made = make(tmp_path, model="llama", bottom=1, top=1)
    guesses = SIP.run(made.view(Knowledge.EXACT, effort="quick"))
    assert guesses.notes["random text"] == 1
    assert made.share(guesses) >= 0.6


def test_noise_takes_most_of_it_for_both_networks(tmp_path):
    plain = make(tmp_path, model="llama", bottom=1, top=1)
    size = float(torch.cat([sent.hidden for sent in plain.sent]).norm(dim=-1).mean())
    noisy = make(tmp_path / "noisy", model="llama", bottom=1, top=1, hidden=Gauss(clip=40 * size, sigma=size))
    before = plain.share(SIP.run(plain.view(Knowledge.EXACT, auxiliary=aux(), effort="quick")))
    for attack in (SIP, NAMOE):
        guesses = attack.run(noisy.view(Knowledge.EXACT, auxiliary=aux(), effort="quick"))
        assert noisy.share(guesses) <= before / 3


def test_an_unknown_bottom_is_not_read(tmp_path):
    made = make(tmp_path, model="llama", bottom=1, top=1)
    guesses = SIP.run(made.view(Knowledge.ARCHITECTURE, auxiliary=aux(), effort="quick"))
    assert made.share(guesses) <= 0.2


def test_the_network_is_taught_on_what_the_mechanism_makes(tmp_path):
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    clipped = defended(hidden, Noise(name="gauss", sigma=0.0, clip=1.0))
    assert float(clipped.norm()) == pytest.approx(1.0)
    rows = defended(hidden, Noise(name="gauss", sigma=0.0, clip=1.0, unit="token"))
    assert rows.norm(dim=-1).max() <= 1.0001
    first, second = (defended(hidden, Noise(name="gauss", sigma=1.0, clip=1e9)) for _ in range(2))
    assert not torch.equal(first, second)
    made = make(tmp_path, model="llama", bottom=1, top=1, hidden=Quantise(bits=4))
    coded = coding_of(made.view())(hidden)
    assert all(len(set(row.tolist())) <= 15 for row in coded)
    assert made.kit.config.vocab_size == VOCAB


@pytest.mark.slow
def test_the_embedded_model_is_read_with_text_of_another_hospital(tmp_path):
    made = make(tmp_path, rows=4, max_length=64)
    text = tuple(tuple(row["input_ids"]) for row in rows_of(made.kit, CLINIC, 30, max_length=64))
    guesses = SIP.run(made.view(Knowledge.BASE, auxiliary=text, effort="quick"))
    assert made.share(guesses) >= 0.6
    assert made.shuffled(guesses) <= 0.2
