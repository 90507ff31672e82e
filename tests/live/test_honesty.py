"""The owner honesty check over CURVE: owners in processes of their own, one honest and two that cheat."""

from __future__ import annotations

import json
import os
from contextlib import closing, contextmanager

import pytest
import torch

from party.honesty import CheatingOwnerError, HonestyProbe
from party.model import open_model
from splitfl.adapters import add_lora, lora_config
from splitfl.kit import open_kit
from tests.live.child import child
from tests.live.models import answer_rows, tokenizer_of
from tests.live.owner import Owner, make_keys

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What an owner has to change in its own process to cheat; the party's code is the installed one.
HIJACK = """
import torch
from model_owner.trunk import Trunk
honest = Trunk.backward
def backward(trunk, kept, gradient):
    true = honest(trunk, kept, gradient)
    entry = kept.request.hidden.float().requires_grad_(True)
    critic = torch.randn(entry.shape[-1], 8, generator=torch.Generator().manual_seed(4))
    (false,) = torch.autograd.grad((entry @ critic).tanh().sum(), entry)
    return false * (true.norm() / false.norm())
Trunk.backward = backward
"""
RETRAIN = """
from model_owner.trunk import Trunk
honest, calls = Trunk.backward, []
def backward(trunk, kept, gradient):
    calls.append(1)
    if len(calls) == 4:
        matrix = next(p for n, p in trunk.base.named_parameters() if "down_proj" in n and p.numel())
        matrix.data = matrix.data * 1.01
    return honest(trunk, kept, gradient)
Trunk.backward = backward
"""


@contextmanager
def cheating(kit, folder, change):
    """An owner in a process of its own that has made `change` to its own code."""
    model_dir, kit_dir = kit
    keys = make_keys(folder / "keys")
    words = ["serve", "--model", model_dir, "--kit", kit_dir, "--bind", "tcp://127.0.0.1:0"]
    words += ["--key", keys / "owner.key_secret", "--parties", keys / "parties"]
    words += ["--batching", "off"]  # trying passes out at the start would count as steps
    program = f"{change}\nfrom splitfl.cli import main\nmain()\n"
    with child(["-c", program, *words], folder) as running:
        _, address, _ = running.stdout.wait_for("ready ").split()
        yield Owner(address=address, model_dir=model_dir, kit_dir=kit_dir, keys=keys, running=running)
        assert running.end() == 0, running.stderr.text


def tune(owner, probe, steps):
    """`steps` of AdamW on real rows, padded on the left, with LoRA below and above the trunk."""
    kit = open_kit(owner.kit_dir)
    base = open_model(kit, probe)
    model = add_lora(base, lora_config(base, kit.plan, target_modules=["all-linear"]), seed=1).train()
    tokenizer = tokenizer_of(owner.kit_dir)
    tokenizer.padding_side = "left"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    texts = [row["prompt"] + row["completion"] for row in answer_rows()]
    for step in range(steps):
        some = [texts[(3 * step + n) % len(texts)] for n in range(3)]
        batch = tokenizer(some, return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("wire_dtype", "memory"), [("float32", "keep"), pytest.param("bfloat16", "recompute", marks=pytest.mark.slow)]
)
def test_an_honest_owner_is_not_accused(owner, wire_dtype, memory):
    with closing(owner.session(wire_dtype=wire_dtype, memory=memory)) as session:
        probe = HonestyProbe(session, every=2, dtype=DTYPES[wire_dtype])
        tune(owner, probe, 12)
    assert probe.tally.inconsistent == 0
    assert probe.tally.repeats == 6
    assert probe.tally.repeats_not_bitwise == 0
    if wire_dtype == "float32":
        assert probe.tally.consistent == 6


def test_an_owner_that_hijacks_the_gradient_is_stopped(tiny_llama, tmp_path):
    with cheating(tiny_llama, tmp_path, HIJACK) as owner, closing(owner.session()) as session:
        probe = HonestyProbe(session, every=4)
        with pytest.raises(CheatingOwnerError) as caught:
            tune(owner, probe, 20)
    assert caught.value.evidence["check"] == "gradient"
    assert probe.tally.consistent == 0
    assert probe.tally.inconsistent == 3  # at the steps 4, 5 and 6
    assert os.fspath(owner.kit_dir) not in json.dumps(caught.value.evidence, allow_nan=False)


@pytest.mark.slow  # one more process
def test_an_owner_whose_weights_change_is_stopped(tiny_llama, tmp_path):
    """1 % on one matrix, at the fourth step; the probe is at every third."""
    with cheating(tiny_llama, tmp_path, RETRAIN) as owner, closing(owner.session()) as session:
        probe = HonestyProbe(session, every=3)
        with pytest.raises(CheatingOwnerError) as caught:
            tune(owner, probe, 20)
    assert caught.value.evidence["check"] == "repeat"
    assert probe.tally.repeats == 1 + 3
    assert probe.tally.consistent == 2, "every gradient was that of the weights of its time"
