"""An attribute of rows by a probe: found where it shows, not under noise, and judged against guessing."""

from __future__ import annotations

import pytest
import torch

from splitfl.audit.attacks.attribute import ATTACK, balanced_accuracy
from splitfl.audit.view import Knowledge
from splitfl.errors import UsageError
from splitfl.privacy.mechanisms import Gauss
from tests.audit.made import make


def rows_with_attribute(count, seed):
    """Rows of random ids; the attribute is the half of the vocabulary that nine of ten tokens come from."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        value = number % 2
        own = torch.rand(10, generator=generator) < 0.9
        low = torch.randint(3, 50, (10,), generator=generator)
        high = torch.randint(50, 97, (10,), generator=generator)
        rows.append((torch.where(own == bool(value), high, low), value))
    return rows


def run(folder, hidden=None):
    rows = rows_with_attribute(24, 0)
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids, _ in rows]
    made = make(folder, model="llama", bottom=1, top=1, examples=examples, hidden=hidden)
    labelled = tuple((tuple(ids.tolist()), value) for ids, value in rows_with_attribute(400, 1))
    guesses = ATTACK.run(made.view(Knowledge.BASE, labelled=labelled, effort="quick"))
    return made, balanced_accuracy(guesses.classes, {row.number: rows[row.row][1] for row in made.truth})


@pytest.mark.slow
def test_the_attribute_shows_in_undefended_states_and_not_under_noise(tmp_path):
    made, plain = run(tmp_path / "plain")
    assert plain["over majority"] >= 0.25
    size = float(torch.cat([sent.hidden for sent in made.sent]).norm(dim=-1).mean())
    _, noisy = run(tmp_path / "noisy", Gauss(clip=20 * size, sigma=20 * size))
    assert noisy["over majority"] <= plain["over majority"] - 0.15


def test_guessing_is_worth_nothing():
    truth = {number: int(number < 2) for number in range(10)}
    assert balanced_accuracy(dict.fromkeys(range(10), 0), truth)["over majority"] == 0
    assert balanced_accuracy(truth, truth)["over majority"] == 0.5
    assert balanced_accuracy(truth, truth)["over frequency"] == pytest.approx(1 - 0.68)
    assert balanced_accuracy({}, truth)["balanced accuracy"] == 0


def test_without_labelled_texts_it_says_what_is_missing(tmp_path):
    made = make(tmp_path, model="llama", bottom=1, top=1, rows=2)
    with pytest.raises(UsageError, match="labelled"):
        ATTACK.run(made.view(Knowledge.BASE))
