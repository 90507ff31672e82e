"""Learned inversion: reads undefended states, and less where noise or another bottom stands in between."""

from __future__ import annotations

import pytest
import torch

from splitfl.audit.attacks import sip
from splitfl.audit.attacks.sip import ATTACKS, coding_of, defended
from splitfl.audit.view import Knowledge, Noise
from splitfl.privacy.mechanisms import Gauss, Quantise
from tests.audit.made import make, random_rows
from tests.families import VOCAB

SIP, NAMOE = ATTACKS


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setitem(sip._EPOCHS, "quick", 3)


def aux(encoder=False):
    return tuple(tuple(row["input_ids"].tolist()) for row in random_rows(80, encoder=encoder, seed=9))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2"])
def test_undefended_states_are_read(tmp_path, family):
    made = make(tmp_path, model=family, bottom=1, top=1)
    guesses = SIP.run(made.view(Knowledge.EXACT, auxiliary=aux(), effort="quick"))
    assert made.share(guesses) >= 0.5
    assert made.shuffled(guesses) <= 0.15


@pytest.mark.long
@pytest.mark.slow
def test_noise_takes_most_of_it_for_both_networks(tmp_path):
    plain = make(tmp_path, model="gpt2", bottom=1, top=1)
    size = float(torch.cat([sent.hidden for sent in plain.sent]).norm(dim=-1).mean())
    noisy = make(tmp_path / "noisy", model="gpt2", bottom=1, top=1, hidden=Gauss(clip=40 * size, sigma=size))
    before = plain.share(SIP.run(plain.view(Knowledge.EXACT, auxiliary=aux(), effort="quick")))
    for attack in (SIP, NAMOE):
        guesses = attack.run(noisy.view(Knowledge.EXACT, auxiliary=aux(), effort="quick"))
        assert noisy.share(guesses) <= before / 3


@pytest.mark.slow
def test_sends_of_a_row_are_averaged(tmp_path):
    plain = make(tmp_path, model="gpt2", bottom=1, top=1)
    size = float(torch.cat([sent.hidden for sent in plain.sent]).norm(dim=-1).mean())
    shares = []
    for epochs in (1, 8):
        made = make(
            tmp_path / str(epochs), model="gpt2", bottom=1, top=1, epochs=epochs,
            hidden=Gauss(clip=40 * size, sigma=0.3 * size),
        )  # fmt: skip
        shares.append(made.share(SIP.run(made.view(Knowledge.EXACT, auxiliary=aux(), effort="quick"))))
    assert shares[1] > shares[0]


@pytest.mark.slow
def test_an_unknown_bottom_is_not_read(tmp_path):
    made = make(tmp_path, model="gpt2", bottom=1, top=1)
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
    made = make(tmp_path, model="gpt2", bottom=1, top=1, hidden=Quantise(bits=4))
    coded = coding_of(made.view())(hidden)
    assert all(len(set(row.tolist())) <= 15 for row in coded)
    assert made.kit.config.vocab_size == VOCAB
