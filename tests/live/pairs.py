"""The same tunable model twice: whole in this process, and split between this process and a live owner."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from party.model import open_model
from party.session import Session
from splitfl.adapters import add_lora, lora_config
from splitfl.data import Collator, Examples, load_rows, tokenise
from splitfl.kit import Kit, open_kit
from tests.live.models import Rows, whole_model
from tests.live.owner import Owner


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Both models, with the same fresh adapter on each."""

    kit: Kit
    session: Session
    whole: PeftModel
    split: PeftModel


@contextmanager
def twins(owner: Owner, *, dtype: str = "auto", session: dict[str, Any] | None = None, **lora: Any) -> Iterator[Twins]:
    """Open both; `lora` as for `splitfl.adapters.lora_config`, `session` as for `Owner.session`."""
    kit = open_kit(owner.kit_dir)
    with closing(owner.session(**(session or {}))) as link:
        base = open_model(kit, link, dtype=dtype)
        config = lora_config(base, kit.plan, **{"target_modules": ["all-linear"], **lora})
        whole_config = copy.deepcopy(config)
        split = add_lora(base, config, seed=1)
        unsplit = whole_model(owner.model_dir, kit.plan.task, dtype=next(split.parameters()).dtype)
        whole = get_peft_model(unsplit, whole_config)
        copy_adapter(split, whole)
        yield Twins(kit=kit, session=link, whole=whole, split=split)


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what training changes, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def copy_adapter(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Put the tuned parameters of one model into the other, which must have the same ones."""
    held = dict(target.named_parameters())
    found = adapter_of(source)
    assert found.keys() == adapter_of(target).keys()
    with torch.no_grad():
        for name, tensor in found.items():
            held[name].copy_(tensor)


def shake(model: torch.nn.Module, *, seed: int = 7) -> None:
    """Draw the adapter anew, so that it changes what the model says (a fresh one changes nothing)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def examples_of(kit: Kit, rows: Rows) -> tuple[Examples, Examples]:
    """Token ids of the rows to train on and of those held out."""
    tokenizer = kit.tokenizer()
    train, held = (
        tokenise(load_rows(path, task=kit.plan.task), tokenizer, max_length=128) for path in (rows.train, rows.held_out)
    )
    return train, held


def collator_of(kit: Kit, padding_side: Any = "right") -> Collator:
    """Pads rows as `splitfl tune` does."""
    return Collator(kit.tokenizer(), padding_side=padding_side, pad_token_id=kit.config.pad_token_id)
