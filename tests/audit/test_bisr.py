"""The chain of BiSR: no worse than its first stage, and its gradient stage helps where the first guess is poor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from splitfl.audit.attacks import sip
from splitfl.audit.attacks.bisr import ATTACK, backward_stage
from splitfl.audit.top import open_top
from splitfl.audit.view import Knowledge
from tests.audit.made import make, random_rows
from tests.families import VOCAB


@pytest.mark.slow
def test_the_chain_reads_more_than_its_first_stage(tmp_path):
    made = make(tmp_path, model="llama", bottom=1, top=1, rows=2)
    aux = tuple(tuple(row["input_ids"].tolist()) for row in random_rows(60, seed=9))
    view = made.view(Knowledge.EXACT, auxiliary=aux, effort="quick")
    first, chain = made.share(sip.ATTACKS[0].run(view)), ATTACK.run(view)
    assert made.share(chain) >= max(first, 0.8)
    assert made.shuffled(chain) <= 0.2
    unseen = tuple(dataclasses.replace(sent, output=None, gradient=None) for sent in made.sent)
    assert ATTACK.run(dataclasses.replace(view, sent=unseen)).notes["changed by the gradient"] == 0


def test_the_gradient_mends_a_first_guess(tmp_path):
    made = make(tmp_path, model="llama", bottom=1, top=0, rows=4)
    top = open_top(made.view(Knowledge.EXACT))
    draws = torch.Generator().manual_seed(1)
    before = after = without = 0
    for sent, row in zip(made.sent, made.truth, strict=True):
        # A guess that names the right token in half of the places.
        logits = torch.randn(len(row.ids), VOCAB, generator=draws)
        known = torch.rand(len(row.ids), generator=draws) < 0.5
        logits[torch.arange(len(row.ids)), row.ids] += 6.0 * known
        before += int((logits.argmax(-1) == row.ids).sum())
        after += int((backward_stage(top, sent, logits).argmax(-1) == row.ids).sum())
        blind = dataclasses.replace(sent, gradient=torch.randn(sent.hidden.shape, generator=draws))
        without += int((backward_stage(top, blind, logits).argmax(-1) == row.ids).sum())
    assert after > before
    assert without <= after
