"""DP-LoRA as published: its clip, its noise, and that nothing is proven."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from party.dp_lora import CLIP, SIGMA, Literal, groups, literal_preview, noise_norm, with_preset
from splitfl.errors import ModelError, UsageError
from tests.federation.test_dp_options import LITERAL, tuning


class Adapted(nn.Module):
    """Named as PEFT names them, with gradients of known length."""

    def __init__(self, wide: int, rank: int, modules: int, *, grad: float) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2).requires_grad_(False)
        for number in range(modules):
            made = nn.Module()
            made.lora_A = nn.ModuleDict({"default": nn.Linear(wide, rank, bias=False)})
            made.lora_B = nn.ModuleDict({"default": nn.Linear(rank, wide, bias=False)})
            self.add_module(f"layer{number}", made)
        for p in self.parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, grad)


def length(parameters):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))


def test_the_noise_of_the_paper_s_bert_is_as_long_as_was_measured():
    """Others ran it on 12 layers with 3 modules of 768 x 512 each, and measured about 75,245."""
    assert noise_norm(12 * 3 * 512 * 768) == pytest.approx(75_248, abs=1)
    assert (SIGMA, CLIP) == (2.0, 10.0)


@pytest.mark.slow
def test_the_noise_that_is_added_has_that_length():
    model = Adapted(768, 512, 36, grad=0.0)
    told = Literal.of("paper").apply(model)
    for name in ("A", "B"):
        assert told[name]["values"] == 12 * 3 * 512 * 768
        assert told[name]["noise"] == pytest.approx(75_248, rel=2e-3)
        assert length(groups(model)[name]) == pytest.approx(75_248, rel=2e-3)


def test_each_group_is_clipped_by_itself_over_all_modules():
    model = Adapted(8, 4, 3, grad=3.0)
    with torch.no_grad():
        for p in groups(model)["B"]:
            p.grad.fill_(0.01)
    before = length(groups(model)["B"])
    told = Literal.of("paper-clip-only").apply(model)
    assert told["A"]["raw"] == pytest.approx(3 * math.sqrt(96), rel=1e-6)
    assert length(groups(model)["A"]) == pytest.approx(CLIP, rel=1e-5)
    assert length(groups(model)["B"]) == pytest.approx(before), "shorter than the clip: left as it is"
    assert "noise" not in told["A"]


def test_the_arm_without_either_leaves_gradients_alone():
    model = Adapted(8, 4, 1, grad=50.0)
    told = Literal.of("paper-no-dp").apply(model)
    assert set(told["A"]) == {"raw", "values"}
    assert all((p.grad == 50).all() for p in groups(model)["A"])


def test_noise_is_new_each_time_and_of_the_right_width():
    one, other = Adapted(40, 20, 2, grad=0.0), Adapted(40, 20, 2, grad=0.0)
    for model in (one, other):
        Literal.of("paper").apply(model)
    first, second = (torch.cat([p.grad.reshape(-1) for p in groups(m)["A"]]) for m in (one, other))
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(20.0, rel=0.15)


def test_whatever_else_is_trained_is_refused():
    model = Adapted(8, 4, 1, grad=1.0)
    model.base.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="A and B alone"):
        Literal.of("paper").apply(model)


def test_a_gradient_that_is_not_finite_stops_the_run():
    with pytest.raises(ModelError, match="not finite"):
        Literal.of("paper").apply(Adapted(8, 4, 1, grad=math.inf))


def test_the_preset_sets_what_the_paper_states_and_refuses_other_figures():
    settled = with_preset(tuning(**LITERAL))
    assert (settled.r, settled.learning_rate, settled.per_device_train_batch_size) == (512, 5e-4, 8)
    assert (settled.rule, settled.local_steps, settled.optim) == ("fedit", 1, "sgd")
    assert with_preset(settled) == settled
    assert not settled.dp_sgd
    with pytest.raises(UsageError, match="--r 16 with --preset paper, which has 512"):
        with_preset(tuning(**LITERAL, r=16))
    assert with_preset(tuning(r=16)).r == 16


def test_the_preview_withholds_epsilon_and_says_why():
    settled = with_preset(tuning(**LITERAL))
    lines = dict(literal_preview(settled, 12 * 3 * 512 * 768))
    assert "75,248" in lines["noise"]
    assert "7,525 times the clip" in lines["noise"]
    assert lines["bound"].startswith("epsilon: none")
    reasons = [text for label, text in literal_preview(settled, 10) if label == "because"]
    assert any("each row's" in reason for reason in reasons)
    assert any("no epsilon of 2" in reason for reason in reasons)
    arm = dict(literal_preview(tuning(protocol="dp-lora", preset="paper-clip-only"), 10))
    assert "none" in arm["noise"]
