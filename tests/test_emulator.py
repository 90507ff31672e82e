"""The emulator: equal to the full model where it keeps all, to a shallower model where not, and what it refuses."""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitfl import emulator as emulator_module
from splitfl.adapters import add_lora, lora_config
from splitfl.compression import quantised, unquantised
from splitfl.cut import keep_party_layers
from splitfl.emulator import (
    EMULATOR_FILE,
    check_belongs,
    file_hash,
    open_emulator,
    uniform_layers,
    write_emulator,
)
from splitfl.errors import ModelError, UsageError
from splitfl.kit import Kit, open_kit, write_kit
from tests.families import CAUSAL, ENCODERS, VOCAB, make_config, make_model, save_model
from tests.live.models import whole_model
from tests.shallow import without_layers

FAMILIES = ["llama", "gpt2", "opt", "gemma2", "bert"]
TRUNK = (2, 3, 4)  # of six layers, one above the cut


def task_of(family):
    return "sequence-classification" if family in ENCODERS else "causal-lm"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> (the full model, its kit)."""
    known = {}

    def make(family):
        if family not in known:
            folder = tmp_path_factory.mktemp("model")
            save_model(family, folder / "model")
            write_kit(folder / "model", folder / "kit", bottom=2, top=1, task=task_of(family))
            known[family] = whole_model(folder / "model", task_of(family)), open_kit(folder / "kit")
        return known[family]

    return make


def batch_of(family):
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    if family not in ENCODERS:
        mask[2, :3] = 0  # padding on the left as well
    labels = torch.tensor([0, 2, 1]) if family in ENCODERS else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_gradients(model, kit, batch):
    tuned = add_lora(model, lora_config(model, kit.plan), seed=3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    loss = tuned(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    tuned.unload()
    model.zero_grad()
    model.requires_grad_(False)
    return loss, found


def assert_same_figures(ours, theirs, batch):
    with torch.no_grad():
        got, expected = ours(**batch), theirs(**batch)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    assert expected.loss.item() > 0.1


# ---- which layers


@pytest.mark.parametrize("first", [0, 3])
def test_uniform_layers_are_those_of_the_formula(first):
    for count in range(1, 41):
        trunk = range(first, first + count)
        for keep in range(1, count + 1):
            chosen = uniform_layers(trunk, keep)
            assert len(set(chosen)) == keep
            assert list(chosen) == sorted(chosen)
            assert set(chosen) <= set(trunk)
            if keep > 1:
                steps = [Fraction(i * (count - 1), keep - 1) for i in range(keep)]
                assert chosen == tuple(first + math.floor(step + Fraction(1, 2)) for step in steps)
                assert (chosen[0], chosen[-1]) == (trunk[0], trunk[-1])
            else:
                assert abs(chosen[0] - (trunk[0] + trunk[-1]) / 2) <= 0.5


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_no_layer_and_more_than_there_are_are_refused(keep):
    with pytest.raises(UsageError, match=f"of {keep} layers"):
        uniform_layers(range(2, 5), keep)


# ---- what it computes


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_layer_is_the_full_model_exactly(family, made, tmp_path):
    full, kit = made(family)
    write_emulator(full, kit, tmp_path / "all", kept=TRUNK, chosen_by="uniform")
    emulated = open_emulator(tmp_path / "all").load(kit)
    batch = batch_of(family)
    assert_same_figures(emulated, full, batch)
    loss, gradients = lora_gradients(emulated, kit, batch)
    expected_loss, expected = lora_gradients(full, kit, batch)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(gradients[name], expected[name])] == []
    assert min(gradient.abs().max().item() for gradient in expected.values()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_layer_is_a_model_without_that_layer(family, made, tmp_path):
    full, kit = made(family)
    write_emulator(full, kit, tmp_path / "ends", kept=(2, 4), chosen_by="uniform")
    emulated = open_emulator(tmp_path / "ends").load(kit)
    batch = batch_of(family)
    assert_same_figures(emulated, without_layers(full, {3}), batch)
    with torch.no_grad():
        assert not torch.allclose(emulated(**batch).logits, full(**batch).logits, atol=1e-2)


def test_the_ends_of_the_trunk_may_be_dropped_too(made, tmp_path):
    full, kit = made("llama")
    write_emulator(full, kit, tmp_path / "middle", kept=(3,), chosen_by="uniform")
    emulated = open_emulator(tmp_path / "middle").load(kit)
    assert_same_figures(emulated, without_layers(full, {2, 4}), batch_of("llama"))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_cached_generation_is_that_of_a_model_without_the_layer(family, made, tmp_path):
    full, kit = made(family)
    write_emulator(full, kit, tmp_path / "ends", kept=(2, 4), chosen_by="uniform")
    emulated = open_emulator(tmp_path / "ends").load(kit)
    batch = batch_of(family)
    ids, mask = batch["input_ids"][[0, 2]], batch["attention_mask"][[0, 2]]
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    wanted = without_layers(full, {3}).generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(emulated.generate(input_ids=ids, attention_mask=mask, **options), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_every_family_can_be_written_and_opened(family, made, tmp_path):
    full, kit = made(family)
    write_emulator(full, kit, tmp_path / "all", kept=TRUNK, chosen_by="uniform")
    assert_same_figures(open_emulator(tmp_path / "all").load(kit), full, batch_of(family))


def test_the_loaded_model_is_frozen_and_in_the_dtype_asked_for(made, tmp_path):
    full, kit = made("llama")
    write_emulator(full, kit, tmp_path / "e", kept=(2, 4), chosen_by="uniform")
    emulator = open_emulator(tmp_path / "e")
    model = emulator.load(kit, torch.bfloat16)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in emulator.load(kit).parameters()} == {torch.float32}


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_in_bits_every_matrix_is_opened_as_its_codes_say(bits, made, tmp_path):
    full, kit = made("gpt2")
    write_emulator(full, kit, tmp_path / "e", kept=(2, 4), chosen_by="uniform", bits=bits)
    opened = dict(open_emulator(tmp_path / "e").load(kit).named_parameters())
    matrices = 0
    for name, weight in full.named_parameters():
        if name.startswith(("transformer.h.2.", "transformer.h.4.")):
            wanted = unquantised(*quantised(weight, bits)) if weight.ndim == 2 else weight
            assert torch.equal(opened[name], wanted), name
            matrices += weight.ndim == 2
    assert matrices == 2 * 4


# ---- what is written


def test_only_the_layers_kept_are_in_the_files(made, tmp_path):
    full, kit = made("opt")
    plan = write_emulator(full, kit, tmp_path / "e", kept=(2, 4), chosen_by="sensitivity", distilled_steps=5)
    files = sorted(path.name for path in (tmp_path / "e").iterdir())
    assert files == sorted([EMULATOR_FILE, *plan.files])
    names = [name for file in plan.files for name in load_file(tmp_path / "e" / file)]
    assert {name.split("layers.")[1].split(".")[0] for name in names} == {"2", "4"}
    layers = full.model.decoder.layers
    assert plan.parameters == sum(p.numel() for index in (2, 4) for p in layers[index].parameters())
    assert (plan.chosen_by, plan.distilled_steps, plan.dtype) == ("sensitivity", 5, "float32")
    assert (plan.plan, plan.trunk) == (kit.plan.digest, kit.plan.trunk)
    emulator = open_emulator(tmp_path / "e")
    assert emulator.plan == plan
    assert emulator.bytes == sum(path.stat().st_size for path in (tmp_path / "e").iterdir())


def test_large_models_are_written_in_several_files(made, tmp_path, monkeypatch):
    full, kit = made("llama")
    monkeypatch.setattr(emulator_module, "_SHARD", 30_000)
    plan = write_emulator(full, kit, tmp_path / "e", kept=TRUNK, chosen_by="uniform")
    assert len(plan.files) > 1
    assert_same_figures(open_emulator(tmp_path / "e").load(kit), full, batch_of("llama"))


def test_a_directory_that_holds_something_is_not_touched(made, tmp_path):
    full, kit = made("llama")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "note").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        write_emulator(full, kit, tmp_path / "e", kept=(2,), chosen_by="uniform")
    assert (tmp_path / "e" / "note").read_text() == "mine"


def test_a_model_that_lacks_a_layer_leaves_nothing_behind(made, tmp_path):
    _, kit = made("llama")
    with pytest.raises(ModelError, match=r"lacks layers \[3\]"):
        write_emulator(without_third(kit), kit, tmp_path / "here" / "e", kept=(2, 3), chosen_by="uniform")
    assert list((tmp_path / "here").iterdir()) == []


def without_third(kit):
    model = make_model(make_config("llama"))
    keep_party_layers(model.base_model, kit.plan, also={2, 4})
    return model


# ---- what is not trusted


@pytest.fixture
def stored(made, tmp_path):
    """An emulator of two files in one directory, and its kit."""
    full, kit = made("llama")
    write_emulator(full, kit, tmp_path / "e", kept=(2, 4), chosen_by="uniform")
    return tmp_path / "e", kit


def rewrite_plan(folder, **changes):
    plan = json.loads((folder / EMULATOR_FILE).read_text())
    plan.update(changes)
    (folder / EMULATOR_FILE).write_text(json.dumps(plan))


def rewrite_tensors(folder, change):
    """Whoever made the files can make the hashes too."""
    file = folder / "emulator-00000.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    rewrite_plan(folder, files={file.name: file_hash(file)})


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "altered":
        content[-5] ^= 1
    elif how == "cut off":
        del content[-7:]
    else:
        content += b"more"
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["altered", "cut off", "longer"])
def test_an_altered_file_is_found_by_its_hash(how, stored):
    folder, _ = stored
    damage(folder / "emulator-00000.safetensors", how)
    with pytest.raises(ModelError, match="cut off or altered") as refused:
        open_emulator(folder)
    assert "emulator-00000.safetensors" in str(refused.value)


@pytest.mark.parametrize("how", ["cut off", "longer"])
def test_a_torn_file_cannot_be_loaded_without_the_hash_either(how, stored):
    folder, kit = stored
    damage(folder / "emulator-00000.safetensors", how)
    with pytest.raises(ModelError, match="cannot be read"):
        open_emulator(folder, verify=False).load(kit)


def test_missing_files_and_no_emulator_at_all(stored, tmp_path):
    folder, _ = stored
    (folder / "emulator-00000.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks emulator-00000"):
        open_emulator(folder)
    with pytest.raises(ModelError, match="is no emulator"):
        open_emulator(tmp_path)


def test_files_of_any_size_are_not_read(stored, monkeypatch):
    folder, _ = stored
    file = folder / "emulator-00000.safetensors"
    monkeypatch.setattr(emulator_module, "LARGEST_FILE", file.stat().st_size - 1)
    with pytest.raises(ModelError, match="too large"):
        open_emulator(folder)
    monkeypatch.undo()
    os.truncate(folder / EMULATOR_FILE, emulator_module.LARGEST_PLAN + 1)
    with pytest.raises(ModelError, match="at most 1048576"):
        open_emulator(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"more": 1},
        {"kept": []},
        {"kept": "2"},
        {"pruned": 1.5},
        {"rank": 0},
        {"bits": 3},
        {"dtype": "object"},
        {"parameters": 0},
        {"distilled_steps": -1},
        {"chosen_by": "me"},
        {"files": {}},
        {"files": {"emulator-00000.safetensors": "x" * 64}},
        {"files": {"emulator-00000.safetensors": "0" * 63}},
        {"files": {"../emulator-00000.safetensors": "0" * 64}},
        {"files": {"/tmp/emulator-00000.safetensors": "0" * 64}},
        {"files": {"emulator-../../x.safetensors": "0" * 64}},
        {"files": {"emulator-.safetensors": "0" * 64}},
        {"files": {"emulator-٣.safetensors": "0" * 64}},
        {"files": {"emulator-1.safetensors\n": "0" * 64}},
        {"files": {EMULATOR_FILE: "0" * 64}},
    ],
    ids=lambda changes: json.dumps(changes)[:50],
)
def test_a_plan_that_no_owner_writes_is_refused(changes, stored):
    folder, _ = stored
    rewrite_plan(folder, **changes)
    with pytest.raises(ModelError, match=r"cannot be read|names files that no emulator has"):
        open_emulator(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_plan_that_is_none_is_refused(content, stored):
    folder, _ = stored
    (folder / EMULATOR_FILE).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        open_emulator(folder)


def test_another_version_is_refused(stored):
    folder, _ = stored
    rewrite_plan(folder, emulator_version=99)
    with pytest.raises(ModelError, match="version 99"):
        open_emulator(folder)


@pytest.mark.parametrize("kept", [[1, 2], [2, 5], [4, 2], [2, 2], [-1]])
def test_layers_that_no_trunk_has_in_that_way_are_refused(kept, stored):
    folder, kit = stored
    rewrite_plan(folder, kept=kept)
    with pytest.raises(ModelError, match="names layers"):
        open_emulator(folder).load(kit)


@pytest.mark.parametrize("field", ["plan", "trunk"])
def test_an_emulator_of_another_model_or_cut_is_refused(field, stored, made):
    folder, kit = stored
    _, other = made("gpt2")
    with pytest.raises(ModelError, match="belongs to plan") as refused:
        open_emulator(folder).load(other)
    assert kit.plan.trunk in str(refused.value)
    assert other.plan.trunk in str(refused.value)
    rewrite_plan(folder, **{field: "\x1b[2J" + "f" * 500})
    with pytest.raises(ModelError, match="belongs to plan") as refused:
        check_belongs(open_emulator(folder).plan, kit)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 600


Q3, Q4 = "model.layers.3.self_attn.q_proj.weight", "model.layers.4.self_attn.q_proj.weight"


def _move(tensors, old, new):
    tensors[new] = tensors.pop(old)


CHANGES = {
    "a tensor of the bottom": lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}),
    "the embedding": lambda t: t.update({"model.embed_tokens.weight": torch.zeros(VOCAB, 32)}),
    "a layer that was dropped": lambda t: t.update({Q3: torch.zeros(32, 32)}),
    "one tensor more": lambda t: t.update({"model.layers.4.extra": torch.zeros(3)}),
    "one tensor less": lambda t: t.pop(Q4),
    "another shape": lambda t: t.update({Q4: torch.zeros(32, 31)}),
    "another shape of the same size": lambda t: t.update({Q4: torch.zeros(16, 64)}),
    "another name": lambda t: _move(t, Q4, "model.layers.4.self_attn.x_proj.weight"),
    "not a number": lambda t: t[Q4].__setitem__((3, 4), math.nan),
    "infinite": lambda t: t[Q4].__setitem__((0, 0), math.inf),
    "codes alone": lambda t: _move(t, Q4, Q4 + ":codes"),
    "a matrix of 16 terabytes": lambda t: t.update(
        {Q4 + ":left": torch.zeros(2_000_000, 1), Q4 + ":right": torch.zeros(1, 2_000_000), Q4: t.pop(Q4)[:0]}
    ),
    "a matrix of 16 terabytes instead": lambda t: (
        t.pop(Q4),
        t.update({Q4 + ":left": torch.zeros(2_000_000, 1), Q4 + ":right": torch.zeros(1, 2_000_000)}),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_files_that_do_not_hold_what_the_plan_says_are_refused(what, stored):
    folder, kit = stored
    rewrite_tensors(folder, CHANGES[what])
    with pytest.raises(ModelError):
        open_emulator(folder).load(kit)


def test_the_same_tensor_in_two_files_is_refused(stored):
    folder, kit = stored
    again = folder / "emulator-00001.safetensors"
    save_file({Q4: torch.zeros(32, 32)}, again)
    first = folder / "emulator-00000.safetensors"
    rewrite_plan(folder, files={first.name: file_hash(first), again.name: file_hash(again)})
    with pytest.raises(ModelError, match="there twice"):
        open_emulator(folder).load(kit)


def test_a_wrong_number_of_parameters_is_refused(stored):
    folder, kit = stored
    rewrite_plan(folder, parameters=5)
    with pytest.raises(ModelError, match="its plan says 5"):
        open_emulator(folder).load(kit)


def test_a_whole_model_in_the_kits_place_is_refused(made, stored):
    folder, kit = stored
    full, _ = made("llama")
    whole = folder.parent / "whole"
    full.save_pretrained(whole)
    with pytest.raises(ModelError, match="tensors of the trunk"):
        open_emulator(folder).load(Kit(path=whole, plan=kit.plan))
