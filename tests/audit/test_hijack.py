"""A lying owner in the sandbox: it reads more than an honest one, not from a frozen bottom, and the check stops it."""

from __future__ import annotations

import pytest
import torch

from model_owner.trunk import LocalLink, Trunk
from party.hijack_sandbox import hijack_sandbox
from splitfl.audit.view import Knowledge
from splitfl.data import Collator
from splitfl.load import load_trunk_side
from tests.audit.made import make, random_rows


@pytest.mark.slow
def test_what_a_lying_owner_gains(tmp_path):
    made = make(tmp_path, model="gpt2", bottom=2, top=1, rows=2)
    link = LocalLink(Trunk(load_trunk_side(made.model, made.kit.plan, dtype=torch.float32), made.kit.plan))
    aux = tuple(tuple(row["input_ids"].tolist()) for row in random_rows(60, seed=9))
    view = made.view(Knowledge.BASE, auxiliary=aux, effort="quick")
    rows = random_rows(8, seed=2)
    collate = Collator(made.kit.config, pad_token_id=0)
    batches = [collate(rows[:4]), collate(rows[4:])]
    gain = hijack_sandbox(view, link, batches, steps=40, learning_rate=5e-3)
    assert gain.lies == 40
    assert gain.lying > gain.honest  # it keeps the bottom readable where honest training moves it away
    assert gain.lies_frozen == 0
    assert gain.frozen == gain.before
    assert gain.before > 0.3
    assert gain.caught_at is not None
    assert gain.caught_at <= 5
