"""Steps 3 and 11 of the journey: the remote trunk, an autograd function standing in the model as a layer.

Forward sends the hidden state and returns the trunk's output; backward sends the gradient and returns the one at the
lower cut. So any training loop and `generate()` run on the party's model without knowing. Mask and positions come from
the call around the layers, as the caller gave them: what reaches a layer differs by family and is never sent.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from party.pipeline import current_part
from splitfl.cut import (
    PassThrough,
    Plan,
    cache_among,
    count_positions,
    counted_length,
    counted_rows,
    entrance,
    module_at,
    renumber_rows,
    slot_of,
)
from splitfl.errors import UsageError
from splitfl.link import TrunkLink, TrunkRequest


class _ThroughTrunk(torch.autograd.Function):
    """One step through the link, with its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, link: TrunkLink, request: TrunkRequest) -> torch.Tensor:
        output, step = link.forward(request)
        ctx.link, ctx.step, ctx.dtype, ctx.device = link, step, hidden.dtype, hidden.device
        ctx.guard = _StepGuard(link, step) if request.keep else None
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.guard.spent = True
        result = ctx.link.backward(ctx.step, gradients[0].contiguous())
        return result.to(ctx.device, ctx.dtype), None, None


class _StepGuard:
    """Tells the owner to forget a kept step whose graph is dropped without a backward pass."""

    def __init__(self, link: TrunkLink, step: int) -> None:
        self.link, self.step, self.spent = link, step, False

    def __del__(self) -> None:
        if not self.spent:
            self.link.release(steps=(self.step,))


class RemoteTrunk(PassThrough):
    """The module at the first trunk position of a party's model.

    Args:
        replaced: the pass-through that stood there.
        plan: the plan.
        link: the road to the owner's trunk.
    """

    def __init__(self, replaced: nn.Module, plan: Plan, link: TrunkLink) -> None:
        super().__init__(replaced, plan.bottom, plan.returns_tuple)
        self.plan, self.link = plan, link
        self.on_hidden: Callable[[torch.Tensor], None] | None = None
        """Sees what comes out of the bottom, with its graph: for a loss on what is sent."""
        self._mask: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._numbers = itertools.count(1)
        self._caches: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()

    def watch(self, base: nn.Module) -> None:
        """Note mask and positions at each call of the module that makes masks and rotary tables."""
        self._signature = inspect.signature(base.forward)
        base.register_forward_pre_hook(self._note_call, with_kwargs=True)

    def _note_call(self, _entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            raise UsageError(
                "The remote trunk was given a prepared attention mask.",
                expected="a 2-D mask [rows, positions], or none; a packed batch is told by its position_ids",
            )
        if positions is not None and positions.ndim != 2:
            raise UsageError(f"Positions of {positions.ndim} dimensions cannot cross.", expected="[rows, positions]")
        # A mask of ones says nothing: the library treats it like none, so it stays here.
        self._mask = None if mask is None or bool(mask.all()) else mask.to(torch.uint8)
        self._positions = None if positions is None else positions.to(torch.int32)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden state [B, T, D] through the owner's trunk, in the family's own return form."""
        part = current_part()
        if self.on_hidden is not None and part is None:
            self.on_hidden(hidden_states)
        cache = cache_among(args, kwargs)
        keep = torch.is_grad_enabled() and hidden_states.requires_grad
        if cache is not None and keep:
            if counted_length(self._counting_slot(cache)):
                raise UsageError(
                    "A gradient was asked for across a filled KV cache.",
                    hint="train without past_key_values, or generate under torch.no_grad()",
                )
            # A cache that training made by default and will not read again is counted here and not kept there.
            count_positions(cache, self.index, hidden_states)
            cache = None
        mask = self._mask
        if cache is not None and counted_length(self._counting_slot(cache)) is None:
            # No layer of this trunk looks at another position: there is nothing to cache.
            cache, mask = None, None if mask is None else mask[:, -hidden_states.shape[1] :]
        number, past, rows = (None, 0, None) if cache is None else self._cache_state(cache, hidden_states.shape[0])
        request = TrunkRequest(
            hidden=hidden_states.detach(),
            mask=mask,
            positions=self._positions,
            keep=keep,
            cache=number,
            past=past,
            rows=rows,
        )
        if cache is not None:
            count_positions(cache, self.index, hidden_states)
        elif part is not None:
            return self.form(part.through(hidden_states, self.link, request, self.on_hidden))
        return self.form(_ThroughTrunk.apply(hidden_states, self.link, request))

    def _counting_slot(self, cache: Cache) -> Any:
        """The first trunk slot of `cache` that counts positions (a slot of a layer without attention does not)."""
        slots = [slot_of(cache, index) for index in self.plan.trunk_layers]
        return next((slot for slot in slots if counted_length(slot) is not None), slots[0])

    def _cache_state(self, cache: Cache, batch: int) -> tuple[int, int, tuple[int, ...] | None]:
        """The owner's number for `cache`, how far it is filled, and its rows in their new order if they moved."""
        slot = self._counting_slot(cache)
        past = counted_length(slot) or 0
        if cache not in self._caches:
            if past:
                raise UsageError(
                    "This KV cache was not filled through this model's remote trunk (a copy has no twin at the owner).",
                    hint="start from an empty cache",
                )
            number = self._caches[cache] = next(self._numbers)
            weakref.finalize(cache, self.link.release, caches=(number,)).atexit = False
        if not past:
            return self._caches[cache], past, None
        rows = tuple(int(row) for row in counted_rows(slot))
        if rows == tuple(range(batch)):
            return self._caches[cache], past, None
        for index in self.plan.trunk_layers:
            renumber_rows(slot_of(cache, index))
        return self._caches[cache], past, rows


def put_remote_trunk(model: PreTrainedModel, plan: Plan, link: TrunkLink) -> RemoteTrunk:
    """Put a remote trunk into a party's model in place, and settle the defaults that would cross the cut.

    Returns:
        The module put in, should its `link` ever have to be exchanged.
    """
    base = model.base_model
    layers = module_at(base, plan.stack)
    remote = RemoteTrunk(layers[plan.bottom], plan, link)
    layers[plan.bottom] = remote
    remote.watch(entrance(base, plan.stack))
    # Training and scoring make no cache that the owner would have to hold; `generate()` asks for one by itself.
    model.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
    if getattr(model.config, "layerdrop", 0.0):
        model.config.layerdrop = 0.0  # dropping the trunk as if it were one layer would not be layer drop
    return remote
