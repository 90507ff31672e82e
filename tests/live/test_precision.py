"""Narrower numbers: on the wire alone, or in the whole computation."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from party.model import open_model
from splitfl.adapters import save_adapter
from splitfl.kit import open_kit
from tests.live.models import make_kit, whole_model
from tests.live.owner import serve
from tests.live.pairs import adapter_of, collator_of, copy_adapter, examples_of, shake, twins


@pytest.fixture(scope="module")
def bf16_owner(tiny_llama, tmp_path_factory):
    """The same model, served and cut in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16")
    kit_dir = make_kit(tiny_llama[0], folder / "kit", dtype="bfloat16")
    with serve(tiny_llama[0], kit_dir, folder) as running:
        yield running


def step(model, batch):
    """Loss, and gradients by name."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def first_batch(pair, rows, padding_side="right"):
    train_rows, _ = examples_of(pair.kit, rows)
    batch = collator_of(pair.kit, padding_side)(train_rows[:6])
    assert not batch["attention_mask"].all()
    return batch


def distance(one, other):
    """Largest difference, relative to the largest gradient."""
    largest = max(tensor.abs().max() for tensor in one.values())
    return max(((one[name] - other[name]).abs().max() / largest).item() for name in one)


def test_bfloat16_on_the_wire_halves_the_bytes_and_rounds(owner, rows):
    figures = {}
    for dtype in ("float32", "bfloat16"):
        with twins(owner, session={"wire_dtype": dtype}) as pair:
            shake(pair.split)
            batch = first_batch(pair, rows)
            before = pair.session.bytes_sent + pair.session.bytes_received
            loss, gradients = step(pair.split, batch)
            moved = pair.session.bytes_sent + pair.session.bytes_received - before
            figures[dtype] = (loss, gradients, moved)
            mask, width = batch["attention_mask"], pair.kit.plan.width
    (exact, exact_gradients, wide), (rounded, rounded_gradients, narrow) = figures["float32"], figures["bfloat16"]
    assert wide - narrow == pytest.approx(4 * mask.numel() * width * 2, abs=16)  # the dtypes' names differ in length
    assert rounded != exact, "nothing was rounded"
    assert rounded == pytest.approx(exact, rel=0.02)
    assert 0 < distance(exact_gradients, rounded_gradients) < 0.1


@pytest.mark.slow  # it has an owner of its own
def test_computing_in_bfloat16_is_exact_too(bf16_owner, rows):
    with twins(bf16_owner, session={"wire_dtype": "bfloat16"}) as pair:
        shake(pair.split)
        copy_adapter(pair.split, pair.whole)
        base = pair.split.get_base_model()
        assert base.lm_head.weight.dtype == torch.bfloat16
        for padding_side in ("right", "left"):
            batch = first_batch(pair, rows, padding_side)
            (whole, whole_gradients), (split, split_gradients) = (step(m, batch) for m in (pair.whole, pair.split))
            assert split == whole
            assert distance(whole_gradients, split_gradients) == 0


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_left_padding_is_exact_with_either_memory(owner, rows, memory):
    with twins(owner, session={"memory": memory}) as pair:
        shake(pair.split)
        copy_adapter(pair.split, pair.whole)
        batch = first_batch(pair, rows, "left")
        (whole, whole_gradients), (split, split_gradients) = (step(m, batch) for m in (pair.whole, pair.split))
        assert split == whole
        assert distance(whole_gradients, split_gradients) == 0


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_saved_adapter_goes_onto_the_whole_model(owner, rows, tmp_path, lora):
    from peft import PeftModel

    with twins(owner, **lora) as pair:
        shake(pair.split)
        batch = first_batch(pair, rows)
        kept = batch["attention_mask"].bool()
        with torch.no_grad():
            split = pair.split.eval()(**batch).logits[kept]
            plain = pair.whole.eval()(**batch).logits[kept]
        save_adapter(pair.split, tmp_path / "ours", base_name="tiny")
        pair.split.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert (split - plain).abs().max() > 0.01, "the adapter says nothing"
    for saved in ("ours", "theirs"):
        model = PeftModel.from_pretrained(whole_model(owner.model_dir), tmp_path / saved).eval()
        with torch.no_grad():
            assert (model(**batch).logits[kept] - split).abs().max() <= 1e-5


def test_an_adapter_saved_on_the_whole_model_goes_through_the_split(owner, rows, tmp_path):
    from splitfl.adapters import open_adapter

    with twins(owner) as pair:
        shake(pair.whole)
        batch = first_batch(pair, rows)
        pair.whole.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        expected = adapter_of(pair.whole)
        with torch.no_grad():
            whole = pair.whole.eval()(**batch).loss
    kit = open_kit(owner.kit_dir)
    with closing(owner.session()) as session:
        model = open_adapter(open_model(kit, session), tmp_path / "adapter", trainable=True).eval()
        assert adapter_of(model).keys() == expected.keys()
        with torch.no_grad():
            assert model(**batch).loss == whole
