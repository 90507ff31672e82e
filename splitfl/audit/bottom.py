"""The bottom as an attacker has it: token ids, or embeddings, to the hidden state at the lower cut.

Any family that can be cut: the kit's own model runs, and leaves at the door of the trunk. Legend: B rows, T positions,
S past plus new ones, D width, E width of the embeddings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from splitfl.adapters import add_lora, lora_config, open_adapter
from splitfl.audit.view import Knowledge, View
from splitfl.cut import module_at


class _Reached(Exception):
    """Leaves the forward pass with the hidden state at the cut."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Bottom:
    """The layers below the cut, and the embeddings; frozen, in eval mode, float32.

    Args:
        model: the kit's model, with an adapter or without.
        stack: module path of the layers in the base model.
        index: of the first trunk layer.
    """

    def __init__(self, model: PreTrainedModel, stack: str, index: int) -> None:
        self.model = model.requires_grad_(False).eval()
        self.embeddings: torch.Tensor = model.get_input_embeddings().weight.detach()
        """[V, E]"""
        door = module_at(model.base_model, stack)[index]
        door.register_forward_pre_hook(self._stop, with_kwargs=True)

    def __call__(self, ids: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        """Hidden state [B, T, D] of `ids` [B, T], or of ``inputs_embeds`` [B, T, E]; differentiable in the latter.

        Further arguments are the model's own: `attention_mask`, `position_ids`, `past_key_values`.
        """
        given = more if ids is None else {"input_ids": ids, **more}
        try:
            self.model(**given)
        except _Reached as reached:
            return reached.hidden
        raise AssertionError("the cut was not reached")

    def new_cache(self) -> DynamicCache:
        """An empty cache for this model, for `past_key_values` with ``use_cache=True``."""
        return DynamicCache(config=self.model.config)

    def alternatives(self, cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, D] of `tokens` [N], each put alone behind what `cache` holds, which stays as it is.

        For causal models without a sliding window shorter than the row: the candidates stand side by side in one row,
        each of which sees the past and itself.
        """
        past, count = cache.get_seq_length(), len(tokens)
        allowed = torch.cat([torch.ones(count, past, dtype=torch.bool), torch.eye(count, dtype=torch.bool)], dim=1)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        places = torch.full((1, count), past)
        hidden = self(
            tokens[None], attention_mask=mask[None, None], position_ids=places, past_key_values=cache, use_cache=True
        )
        cache.crop(-count)
        return hidden[0]

    @staticmethod
    def _stop(_door: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])


def open_bottom(view: View) -> Bottom:
    """The bottom that this attacker knows: random at K0, the kit's from K1 on, with the seed's adapter at K2, the
    party's own at K3."""
    plan = view.kit.plan
    return Bottom(known_model(view), plan.stack, plan.bottom)


@torch.no_grad()
def is_causal(bottom: Bottom) -> bool:
    """Whether a position at the cut depends on earlier ones alone; tried, since families do not say it alike."""
    ids = torch.arange(5, 9)[None] % len(bottom.embeddings)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 7) % len(bottom.embeddings)
    one, two = bottom(ids), bottom(other)
    return bool(torch.allclose(one[0, :-1], two[0, :-1], atol=1e-5))


def known_model(view: View) -> PreTrainedModel:
    """The kit's model as this attacker knows it, bottom and top, float32; pass-throughs where the trunk is."""
    plan = view.kit.plan
    model = _random(view) if view.knowledge == Knowledge.ARCHITECTURE else view.kit.load(torch.float32)
    if view.knowledge == Knowledge.SEED and view.lora is not None:
        told = dict(view.lora)
        seed = int(str(told.pop("seed", 0)))
        add_lora(model, lora_config(model, plan, **told), seed=seed)  # type: ignore[arg-type]
    if view.knowledge == Knowledge.EXACT and view.adapter is not None:
        open_adapter(model, view.adapter)
    return model


def _random(view: View) -> PreTrainedModel:
    model = view.kit.load(torch.float32)
    with _seeded(view.seed), torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float(parameter.mean().abs() > 0.5))  # gains stay 1, biases 0
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
