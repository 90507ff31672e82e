"""Adapters for the attacks on weights: overfitted on a few rows, or tuned with DP-SGD; tiny models and a real one."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from party.private_plan import plan_private
from splitfl.adapters import add_lora, lora_config
from splitfl.data import Collator, load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import load_tokenizer, make_plan
from splitfl.load import quiet_library
from tests.families import make_config, make_model
from tests.privacy.test_private_sgd import cut_of, trainer_of
from tests.small_tokenizers import bpe

MODEL = assets() / "model"


def tiny():
    """A tiny random model and its cut."""
    base = make_model(make_config("llama")).requires_grad_(False)
    return base, cut_of(base), Collator(bpe(), pad_token_id=0)


def embedded(count, *, max_length=48):
    """The embedded model, its cut, a collator, and `count` of the hospital's rows as examples and as texts."""
    with quiet_library():
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).requires_grad_(False).eval()
    tokenizer = load_tokenizer(MODEL)
    rows = load_rows(assets() / "data" / "hospital.train.jsonl", task="causal-lm")
    made = tokenise(rows, tokenizer, max_length=max_length, truncation="right")[:count]
    cut = make_plan(MODEL, bottom=2, top=2, dtype="float32")
    return base, cut, Collator(tokenizer), made, [tokenizer.decode(each["input_ids"]) for each in made]


def with_adapter(base, cut, *, r=8, seed=0):
    return add_lora(copy.deepcopy(base), lora_config(base, cut, r=r, target_modules=["all-linear"]), seed=seed)


def overfitted(base, cut, collator, rows, *, epochs=20, batch=8, rate=1e-2, r=8, seed=0):
    """A plain AdamW loop."""
    model = with_adapter(base, cut, r=r, seed=seed).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=generator).split(batch):
            inputs = collator([{k: v for k, v in rows[at].items() if k != "row"} for at in part.tolist()])
            loss = model(**inputs, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def private(base, cut, rows, *, noise, steps, batch=8, rate=1e-2, seed=0):
    """The same with the real DP-SGD loop: the model, and the epsilon that it claims at delta 1e-5."""
    units = [str(number) for number in range(len(rows))]
    numbered = [{**row, "row": number} for number, row in enumerate(rows)]
    plan = plan_private(
        units=units, unit="row", batch=batch, max_steps=steps, epochs=1.0, clip=1.0, delta=1e-5,
        noise_multiplier=noise, epsilon=None,
    )  # fmt: skip
    model = with_adapter(base, cut, seed=seed)
    with tempfile.TemporaryDirectory() as place:
        how = {"optim": "adamw_torch", "learning_rate": rate, "lr_scheduler_type": "constant", "weight_decay": 0.0}
        trainer_of(model, Path(place), plan, numbered, **how).train()
    return model.eval(), plan.epsilon
