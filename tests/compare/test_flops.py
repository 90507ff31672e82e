"""Operations from shapes are those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from splitfl.adapters import add_lora, lora_config
from splitfl.compare.flops import Work, operations, read_shapes
from splitfl.errors import ModelError
from splitfl.kit import open_kit
from tests.live.models import make_kit, save_tiny, whole_model

ROWS, LENGTH, RANK = 2, 16, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flops")
    return save_tiny("llama", folder / "model"), make_kit(folder / "model", folder / "kit", dtype="float32")


def test_lora_on_the_whole_model_costs_what_torch_counts(tiny):
    import msgspec

    model_dir, kit = tiny
    plan = open_kit(kit).plan
    base = whole_model(model_dir, dtype=torch.float32, attn_implementation="eager")
    everywhere = msgspec.structs.replace(plan, bottom=plan.layers, top=0)
    config = lora_config(base, everywhere, r=RANK, lora_alpha=8, target_modules=["all-linear"])
    model = add_lora(base, config, seed=0).train()
    ids = torch.randint(0, base.config.vocab_size, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    shapes = read_shapes(model_dir, classifies=False)
    work = Work(trained=ROWS * LENGTH, length=LENGTH, rank=RANK)
    found, owner = operations(shapes, None, 1, 1, 0, work)
    assert owner == 0
    assert found == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_a_party_saves_an_owner_does(tiny):
    shapes = read_shapes(tiny[0], classifies=False)
    count = len(shapes.layers)
    work = Work(trained=100.0, passed=50.0, length=10.0, rank=0)
    whole, _ = operations(shapes, "fed-params", 1, 1, 0, Work(trained=100.0, length=10.0, rank=0))
    party, owner = operations(shapes, "split", 1, 1, 0, work)
    assert party + owner == pytest.approx(whole)
    once, forward = operations(shapes, "guarded-gradfree", 1, 1, 0, work)
    assert once < party
    assert owner / 5 < forward < owner / 4  # half the tokens, and no way back, in which attention costs twice
    offline, nothing = operations(shapes, "guarded-offline", 1, 1, count - 2, work)
    assert nothing == 0
    assert offline == pytest.approx(party + owner)


def test_a_directory_without_layers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4, "vocab_size": 4}', encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be told"):
        read_shapes(tmp_path, classifies=False)
