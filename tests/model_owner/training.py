"""A short training through any link, and what it leaves: for comparing one link with another bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel

from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.kit import Kit
from splitfl.link import TrunkLink

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Losses, and the adapter at the end."""

    losses: list[float]
    adapter: dict[str, torch.Tensor]

    def assert_equals(self, other: Trained) -> None:
        assert self.losses == other.losses
        assert self.adapter.keys() == other.adapter.keys()
        assert [name for name in self.adapter if not torch.equal(self.adapter[name], other.adapter[name])] == []


def prepare(kit: Kit, link: TrunkLink) -> PeftModel:
    """A party's model with a fresh adapter, always the same (it is drawn from the process's one generator)."""
    base = open_model(kit, link)
    return add_lora(base, lora_config(base, kit.plan, target_modules=["all-linear"]), seed=1).train()


def train(kit: Kit, link: TrunkLink, *, before_step: Callable[[int], None] = lambda step: None) -> Trained:
    """Train a fresh adapter; see `run`."""
    return run(prepare(kit, link), before_step=before_step)


def run(model: PeftModel, *, before_step: Callable[[int], None] = lambda step: None) -> Trained:
    """Some steps of AdamW on fixed rows, two micro-batches each, one row padded on the left."""
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(STEPS):
        before_step(step)
        for _ in range(2):
            tokens = torch.randint(3, 60, (2, 9), generator=generator)
            mask = torch.ones_like(tokens)
            mask[0, :4] = 0
            loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Trained(losses=losses, adapter=adapter)
