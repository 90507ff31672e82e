"""Measure how far a split model is from the unsplit one: loss, LoRA gradients, an optimiser step, generated tokens."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from model_owner.trunk import LocalLink, Trunk
from party.remote import put_remote_trunk
from splitfl.adapters import add_lora, lora_config
from splitfl.cut import Plan, Task
from splitfl.kit import open_kit, write_kit
from splitfl.load import load_config, load_trunk_side, model_class, quiet_library

PADDINGS = ("none", "right", "left")
NEW_TOKENS = 12


@dataclass
class Difference:
    """Largest absolute differences between split and unsplit, over all paddings; 0.0 is bitwise equality."""

    family: str
    cut: tuple[int, int]
    loss: float = 0.0
    gradient: float = 0.0
    stepped: float = 0.0
    """Of the adapter after one AdamW step."""
    logits: float = 0.0
    tokens_equal: dict[str, bool] = field(default_factory=dict)
    """Generated tokens, by method and padding."""

    @property
    def largest(self) -> float:
        return max(self.loss, self.gradient, self.stepped, self.logits)

    @property
    def tokens_all_equal(self) -> bool:
        return all(self.tokens_equal.values())


@dataclass
class Pair:
    """The same tuned model twice: whole, and cut."""

    plan: Plan
    full: PeftModel
    party: PeftModel


def make_pair(
    model_dir: Path,
    cut: tuple[int, int],
    task: Task = "causal-lm",
    *,
    recompute: bool = False,
    targets: tuple[str, ...] = ("all-linear",),
) -> Pair:
    """Cut the checkpoint in `model_dir` through a real kit and put the same random adapter on both models."""
    with tempfile.TemporaryDirectory() as folder, quiet_library():
        kit_dir = Path(folder) / "kit"
        plan = write_kit(model_dir, kit_dir, bottom=cut[0], top=cut[1], task=task).plan
        full: PreTrainedModel = model_class(load_config(model_dir), task).from_pretrained(model_dir)
        full.config.use_cache = False
        trunk = Trunk(load_trunk_side(model_dir, plan, dtype=torch.float32), plan)
        party_base = open_kit(kit_dir).load()
    for side in (full, trunk.base, party_base):
        _align(side)
    put_remote_trunk(party_base, plan, LocalLink(trunk, recompute=recompute))
    config = lora_config(party_base, plan, r=4, lora_alpha=8, target_modules=list(targets))
    whole_config = copy.deepcopy(config)
    party = add_lora(party_base, config)
    whole = get_peft_model(full, whole_config)
    torch.manual_seed(7)
    for _, parameter in _trainable(party):
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    whole.load_state_dict(party.state_dict(), strict=False)
    # PEFT rewrites some names to fused experts, of every layer: those in the trunk add nothing and are not tuned.
    held = {name for name, _ in party.named_parameters()}
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in held)
    return Pair(plan=plan, full=whole, party=party)


def _align(model: PreTrainedModel) -> None:
    """Copy weights out of the mapped file, where they lie as the file has them.

    The same numbers at another alignment are multiplied by another kernel, and round differently (up to 1e-5 seen).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _trainable(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def make_batch(
    padding: str, task: Task, *, rows: int = 3, length: int = 11, vocab: int = 97
) -> dict[str, torch.Tensor]:
    """Random token ids [B, T] with some rows padded, their mask, and labels."""
    generator = torch.Generator().manual_seed(PADDINGS.index(padding))
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 4, 2)):
        if missing and padding != "none":
            mask[row, slice(length - missing, None) if padding == "right" else slice(missing)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.arange(rows) % 3 if task == "sequence-classification" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compare_training(pair: Pair, result: Difference) -> None:
    """Loss, logits, gradients and one AdamW step for every padding."""
    for padding in PADDINGS:
        batch = make_batch(padding, pair.plan.task)
        outcomes = []
        for model in (pair.full, pair.party):
            twin = model.train()
            before = {name: p.detach().clone() for name, p in _trainable(twin)}
            optimiser = torch.optim.AdamW([p for _, p in _trainable(twin)], lr=1e-2)
            optimiser.zero_grad()
            output = twin(**batch)
            output.loss.backward()
            gradients = {name: p.grad.clone() for name, p in _trainable(twin) if p.grad is not None}
            optimiser.step()
            stepped = {name: p.detach().clone() for name, p in _trainable(twin)}
            with torch.no_grad():
                for name, parameter in _trainable(twin):
                    parameter.copy_(before[name])
            kept = batch["attention_mask"].bool() if pair.plan.task == "causal-lm" else slice(None)
            outcomes.append((output.loss.item(), gradients, stepped, output.logits.detach()[kept]))
        (loss_a, grads_a, step_a, logits_a), (loss_b, grads_b, step_b, logits_b) = outcomes
        assert grads_a.keys() == grads_b.keys()
        assert grads_a
        assert pair.plan.bottom == 0 or any(grad.any() for name, grad in grads_b.items() if ".0." in name), (
            "no gradient"
        )
        result.loss = _larger(result.loss, abs(loss_a - loss_b))
        result.logits = _larger(result.logits, _largest({"": logits_a}, {"": logits_b}))
        result.gradient = _larger(result.gradient, _largest(grads_a, grads_b))
        result.stepped = _larger(result.stepped, _largest(step_a, step_b))


def _larger(one: float, other: float) -> float:
    """The larger of two; infinite if one is not a number, which `max` would overlook."""
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def _largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return functools.reduce(_larger, ((one[name] - other[name]).abs().max().item() for name in one))


def generate(model: PeftModel, batch: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """Cached generation of exactly `NEW_TOKENS` tokens; returns the new ones."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        tokens = model.eval().generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pad_token_id=0,
            eos_token_id=2,
            **{**settings, **options},
        )
    return tokens[:, batch["input_ids"].shape[1] :]


METHODS: dict[str, dict[str, int]] = {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}}


def compare_generation(
    pair: Pair,
    result: Difference,
    *,
    new_tokens: int = NEW_TOKENS,
    runs: Iterable[tuple[str, str]] = tuple(itertools.product(METHODS, ("none", "left"))),
) -> None:
    """Greedy and beam search with a cache, without and with left padding, past any sliding window.

    Args:
        runs: pairs of method and padding.
    """
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    for method, padding in runs:
        batch = make_batch(padding, pair.plan.task)
        whole, split = (generate(model, batch, **length, **METHODS[method]) for model in (pair.full, pair.party))
        assert whole.shape[1] == new_tokens
        result.tokens_equal[f"{method}, {padding} padding"] = torch.equal(whole, split)


def measure(family: str, model_dir: Path, cut: tuple[int, int], task: Task = "causal-lm") -> Difference:
    """Everything at once, for one family at one cut."""
    pair = make_pair(model_dir, cut, task)
    result = Difference(family, cut)
    compare_training(pair, result)
    if task == "causal-lm":
        compare_generation(pair, result)
    return result
