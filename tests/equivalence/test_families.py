"""The ground everything stands on: protection off, the split model equals plain LoRA, for every family and cut."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence.measure import Difference, compare_training, make_batch, make_pair, measure
from tests.families import CAUSAL, ENCODERS, save_model

CUTS = ((1, 1), (2, 3))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_family_equals_the_unsplit_model(family, cut, tmp_path):
    difference = measure(family, save_model(family, tmp_path / "model"), cut)
    assert difference.largest <= 1e-6
    assert difference.tokens_equal
    assert difference.tokens_all_equal, difference.tokens_equal


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_family_equals_the_unsplit_model(family, cut, tmp_path):
    difference = measure(family, save_model(family, tmp_path / "model"), cut, "sequence-classification")
    assert difference.largest <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_recompute_gives_the_same_gradients_as_keep(family, tmp_path):
    task = "sequence-classification" if family in ENCODERS else "causal-lm"
    result = Difference(family, (2, 2))
    compare_training(make_pair(save_model(family, tmp_path / "model"), (2, 2), task, recompute=True), result)
    assert result.largest <= 1e-6


def test_an_embedding_cut_without_bottom_layers_is_exact(tmp_path):
    difference = measure("llama", save_model("llama", tmp_path / "model"), (0, 2))
    assert difference.largest <= 1e-6
    assert difference.tokens_all_equal


def test_packed_rows_with_restarting_positions_are_exact(tmp_path):
    pair = make_pair(save_model("llama", tmp_path / "model"), (2, 2))
    batch = make_batch("none", "causal-lm", rows=1, length=12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    losses = [
        model.train()(input_ids=batch["input_ids"], position_ids=positions, labels=batch["labels"]).loss.item()
        for model in (pair.full, pair.party)
    ]
    plain = pair.full(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert losses[0] == losses[1]
    assert losses[0] != plain
