"""The check that `splitfl kit` makes on a real model directory: it passes what is right and finds what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_owner.trunk import Trunk
from party.selfcheck import check_cut
from splitfl.errors import ModelError
from splitfl.kit import open_kit, write_kit
from splitfl.load import load_trunk_side
from tests.equivalence.sweep import build
from tests.families import ENCODERS, save_model


def cut_model(family, folder, dtype="float32"):
    model_dir = save_model(family, folder / "model")
    task = "sequence-classification" if family in ENCODERS else "causal-lm"
    write_kit(model_dir, folder / "kit", bottom=2, top=2, task=task, dtype=dtype)
    kit = open_kit(folder / "kit")
    return model_dir, kit, Trunk(load_trunk_side(model_dir, kit.plan, dtype=getattr(torch, dtype)), kit.plan)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt, projected embeddings", "bert"])
def test_halves_of_a_model_pass(family, tmp_path):
    outcome = check_cut(*cut_model(family, tmp_path))
    assert outcome.largest <= 1e-6
    assert (outcome.generation is None) == (family in ENCODERS)
    assert "float32" in str(outcome)


def test_a_head_for_other_classes_than_the_checkpoints_is_drawn_anew(tmp_path):
    model_dir = save_model("bert", tmp_path / "model")  # with a head for three classes
    summary = write_kit(
        model_dir, tmp_path / "kit", bottom=2, top=2, task="sequence-classification", label_names=("no", "yes")
    )
    assert summary.new_head == ["classifier.bias", "classifier.weight"]
    kit = open_kit(tmp_path / "kit")
    assert kit.load(torch.float32).classifier.weight.shape[0] == 2
    trunk = Trunk(load_trunk_side(model_dir, kit.plan, dtype=torch.float32), kit.plan)
    assert check_cut(model_dir, kit, trunk).largest <= 1e-6


def test_halves_in_a_short_format_pass(tmp_path):
    outcome = check_cut(*cut_model("llama", tmp_path, "bfloat16"))
    assert outcome.dtype == "bfloat16"
    assert outcome.largest <= outcome.tolerance < 0.1


def test_a_layer_that_keeps_a_part_in_float32_passes_in_a_short_format(tmp_path):
    build("flint").save_pretrained(tmp_path / "model")
    write_kit(tmp_path / "model", tmp_path / "kit", bottom=1, top=1, dtype="bfloat16")
    kit = open_kit(tmp_path / "kit")
    trunk = Trunk(load_trunk_side(tmp_path / "model", kit.plan, dtype=torch.bfloat16), kit.plan)
    assert {p.dtype for p in trunk.base.parameters()} == {torch.bfloat16, torch.float32}
    assert trunk.dtype == torch.bfloat16
    outcome = check_cut(tmp_path / "model", kit, trunk)
    assert outcome.largest <= outcome.tolerance


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_other_weights_in_the_trunk_are_found(family, tmp_path):
    model_dir, kit, trunk = cut_model(family, tmp_path)
    with torch.no_grad():
        for parameter in trunk.base.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ModelError, match="do not equal the whole"):
        check_cut(model_dir, kit, trunk)


def test_a_trunk_that_sees_no_mask_is_found(tmp_path, monkeypatch):
    model_dir, kit, trunk = cut_model("llama", tmp_path)
    run = trunk.run

    def run_unmasked(hidden, request, cache):
        return run(hidden, dataclasses.replace(request, mask=None), cache)

    monkeypatch.setattr(trunk, "run", run_unmasked)
    with pytest.raises(ModelError, match="do not equal the whole"):
        check_cut(model_dir, kit, trunk)


def test_not_a_number_anywhere_is_found(tmp_path):
    model_dir, kit, trunk = cut_model("gpt2", tmp_path)
    with torch.no_grad():
        for name, parameter in trunk.base.named_parameters():
            if name.startswith("h.3."):
                parameter.fill_(torch.nan)
    with pytest.raises(ModelError, match="inf of their scale"):
        check_cut(model_dir, kit, trunk)


def test_a_family_that_fails_in_the_halves_is_refused_in_words(tmp_path, monkeypatch):
    model_dir, kit, trunk = cut_model("llama", tmp_path)

    def reach_for_a_layer(*_args, **_kwargs):
        raise AttributeError("'PassThrough' object has no attribute 'shared_table'")

    monkeypatch.setattr(trunk, "_entrance", reach_for_a_layer)
    with pytest.raises(ModelError, match=r"cut in this place cannot be run .*shared_table"):
        check_cut(model_dir, kit, trunk)
