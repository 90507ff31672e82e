"""Each side holds its own tensors and no others; `test_wire_capture` runs without the trunk's files at all."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from splitfl.kit import open_kit
from splitfl.load import is_trunk_tensor, load_trunk_side, tensor_names
from tests.families import ENCODERS
from tests.live.models import make_kit, save_tiny


@pytest.fixture(params=["llama", "gpt2", "bert"])
def checkpoint(request, tmp_path):
    """Model directory and kit of one family."""
    task = "sequence-classification" if request.param in ENCODERS else "causal-lm"
    model_dir = save_tiny(request.param, tmp_path / "model")
    return model_dir, make_kit(model_dir, tmp_path / "kit", task=task)


def read(folder):
    tensors = {}
    for name, file in tensor_names(folder).items():
        with safe_open(file, framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def test_a_party_loads_what_is_in_the_kit_and_none_of_it_is_trunk(checkpoint):
    kit = open_kit(checkpoint[1])
    in_kit, whole = read(kit.path), read(checkpoint[0])
    held = dict(kit.load().named_parameters())
    assert held.keys() == in_kit.keys()
    assert [name for name in held if not torch.equal(held[name], in_kit[name])] == []
    trunk = {name for name in whole if is_trunk_tensor(name, kit.plan)}
    assert len(trunk) > 10
    assert not trunk & in_kit.keys()
    # A checkpoint of a bare encoder names its tensors without the prefix that they have below a head.
    assert {name for name in whole if not any(given.endswith(name) for given in in_kit)} == trunk


def test_an_owner_loads_every_tensor_of_the_trunk_and_none_of_a_partys_layers(checkpoint):
    model_dir, kit_dir = checkpoint
    plan = open_kit(kit_dir).plan
    trunk = {name: tensor for name, tensor in read(model_dir).items() if is_trunk_tensor(name, plan)}
    held = dict(load_trunk_side(model_dir, plan, dtype=torch.float32).named_parameters())
    inside = {name: p for name, p in held.items() if is_trunk_tensor(name, plan)}
    assert len(inside) == len(trunk)
    for name, tensor in trunk.items():
        relative = name[name.index(f"{plan.stack}.") :]
        assert torch.equal(inside[relative], tensor), name
    # Besides, only small things around the layers: norms, position tables, a pooler. No token embedding, no head.
    rest = held.keys() - inside.keys()
    assert not [name for name in rest if f"{plan.stack}." in name]
    assert all(
        not name.startswith(("embed_tokens", "wte", "embeddings.word", "lm_head", "classifier")) for name in rest
    )
    assert not any(p.requires_grad for p in held.values())
