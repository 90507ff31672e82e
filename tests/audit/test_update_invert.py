"""Bags of tokens from updates: one step of gradient descent tells them, until the rank is used up."""

from __future__ import annotations

import pytest
import torch

from model_owner.trunk import LocalLink, Trunk
from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.audit.attacks.update_invert import ATTACK, span_test
from splitfl.audit.view import Knowledge, Update, View
from splitfl.kit import open_kit, write_kit
from splitfl.load import load_trunk_side
from tests.families import save_model


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    model = save_model("llama", folder / "model")
    write_kit(model, folder / "kit", bottom=2, top=1, dtype="float32", task="causal-lm")
    return open_kit(folder / "kit"), model


def updated(kit, model, ids, *, r, steps=1, optimiser=torch.optim.SGD, rate=0.1):
    base = open_model(kit, LocalLink(Trunk(load_trunk_side(model, kit.plan, dtype=torch.float32), kit.plan)))
    party = add_lora(base, lora_config(base, kit.plan, r=r, target_modules=["q_proj", "v_proj"]), seed=0)
    tuned = optimiser([p for p in party.parameters() if p.requires_grad], lr=rate)

    def state():
        return {name: p.detach().clone() for name, p in party.named_parameters() if p.requires_grad}

    before = state()
    for _ in range(steps):
        loss = party(input_ids=ids, labels=ids).loss
        tuned.zero_grad()
        loss.backward()
        tuned.step()
    return Update(number=0, round=1, before=before, after=state())


def run(kit, update):
    return ATTACK.run(View(kit=kit, knowledge=Knowledge.BASE, updates=(update,)))


IDS = torch.tensor([[5, 17, 33, 60, 17, 90]])


def test_the_first_round_tells_the_bag(kit):
    guesses = run(kit[0], updated(*kit, IDS, r=16))
    assert set(IDS[0, :-1].tolist()) <= set(guesses.bags[0])
    assert len(guesses.bags[0]) <= 8
    assert guesses.notes["vacuous"] == 0


def test_a_second_step_of_descent_tells_it_too(kit):
    guesses = run(kit[0], updated(*kit, IDS, r=16, steps=2))
    assert len(set(IDS[0].tolist()) & set(guesses.bags.get(0, ()))) >= 4


def test_as_many_tokens_as_the_rank_say_nothing_and_the_notes_say_so(kit):
    guesses = run(kit[0], updated(*kit, torch.arange(10, 50)[None], r=8))
    assert guesses.notes["vacuous"] >= 1
    assert 0 not in guesses.bags


def test_adam_blurs_the_span(kit):
    plain = run(kit[0], updated(*kit, IDS, r=16)).bags[0]
    blurred = run(kit[0], updated(*kit, IDS, r=16, optimiser=torch.optim.Adam, rate=1e-3)).bags.get(0, ())
    assert len(set(IDS[0].tolist()) & set(blurred)) < len(set(IDS[0].tolist()) & set(plain))


def test_the_span_of_rows_is_told_from_what_lies_outside():
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(3, 10, generator=generator), torch.randn(3, 10, generator=generator)
    span = span_test(torch.randn(20, 3, generator=generator) @ inside, torch.cat([inside, outside]))
    assert span.rank == 3
    assert not span.vacuous
    assert span.distance[:3].max() < 1e-3
    assert span.distance[3:].min() > 0.1
