"""A party's model takes an update and gives the same bits back; what is merged changes the base weights."""

from __future__ import annotations

import pytest
import torch

from party.federated_model import SharedModel
from splitfl.adapters import add_lora, lora_config
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.rules import rule_named
from splitfl.errors import ModelError
from splitfl.kit import open_kit
from tests.families import make_config, make_model
from tests.live.models import make_kit, save_tiny

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def kit(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return open_kit(make_kit(save_tiny(request.param, folder / "model"), folder / "kit", dtype="float32"))


@pytest.fixture
def shared(kit):
    torch.manual_seed(3)
    base = make_model(make_config(kit.plan.model_type)).requires_grad_(False).eval()
    return SharedModel(add_lora(base, lora_config(base, kit.plan, r=4, lora_alpha=8, target_modules=["all-linear"])))


def drawn(update: Update, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)

    def draw(_: str, pair: Pair) -> Pair:
        a, b = (0.05 * torch.randn(t.shape, generator=generator) for t in (pair.a, pair.b))
        return Pair(a, b, pair.scale)

    return update.map(draw)


def logits(shared: SharedModel) -> torch.Tensor:
    with torch.no_grad():
        return shared.model.eval()(input_ids=IDS).logits


def test_what_is_loaded_comes_back_bit_for_bit(shared):
    update = drawn(shared.template())
    shared.load(update, {})
    back = shared.read()
    assert back.pairs.keys() == update.pairs.keys()
    for name, pair in update.pairs.items():
        assert torch.equal(pair.a, back.pairs[name].a)
        assert torch.equal(pair.b, back.pairs[name].b)


def test_a_merged_change_is_the_same_model_as_an_adapter_with_it(shared):
    update, nothing = drawn(shared.template()), shared.template()
    plain = logits(shared)
    shared.load(update, {})
    adapted = logits(shared)
    merged = {name: Pair(pair.a, pair.b, pair.scale) for name, pair in update.pairs.items()}
    shared.load(nothing, merged)
    assert not torch.equal(plain, adapted)
    torch.testing.assert_close(logits(shared), adapted, rtol=0, atol=2e-5)
    shared.load(nothing, {})
    assert torch.equal(logits(shared), plain)  # taken out again without a trace


def test_another_rank_gets_an_adapter_of_that_rank(shared):
    wide = drawn(shared.template(6))
    assert wide.ranks == {6}
    assert {pair.scale for pair in wide.pairs.values()} == {8 / 6}
    shared.load(wide, {})
    name = min(wide.pairs)
    assert torch.equal(shared.read().pairs[name].b, wide.pairs[name].b)
    narrow = wide.map(lambda _, pair: Pair(pair.a[:2].contiguous(), pair.b[:, :2].contiguous(), pair.scale))
    shared.load(narrow, {})
    assert shared.read().ranks == {2}


@pytest.mark.parametrize(("part", "count"), [("A", 1), ("B", 1), ("both", 2), ("core", 0)])
def test_only_what_the_rule_names_gets_a_gradient(shared, part, count):
    shared.let_train(part)
    trained = {name for name, p in shared.model.named_parameters() if p.requires_grad}
    assert len(trained) == count * len(shared.template().pairs)
    assert all(f"lora_{part}" in name for name in trained) or part in ("both", "core")


def test_a_state_of_other_modules_is_refused(shared):
    update = shared.template()
    fewer = Update(dict(list(update.pairs.items())[1:]))
    with pytest.raises(ModelError, match="differ"):
        shared.load(fewer, {})


@pytest.mark.parametrize("rule", ["rolora", "fedit", "ffa", "flora", "fedex", "fedsvd", "fed-sb", "fedlrt"])
def test_the_start_of_every_rule_can_be_loaded_and_changes_nothing(shared, rule):
    plain = logits(shared)
    chosen = rule_named(rule)
    state = chosen.first(shared.template(), 0)
    shared.load(chosen.start(state, 0), state.merged)
    torch.testing.assert_close(logits(shared), plain, rtol=0, atol=1e-6)
