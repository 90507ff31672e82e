"""Step 10 of the journey: the frozen trunk. Hidden state in, hidden state out; gradient in, gradient out.

The base model runs whole, so that its own code builds masks, rotary tables and caches from the 2-D mask and positions.
At the door, a pre-hook on the first trunk layer puts the received state in place of whatever the embedding stage made;
a hook on the last trunk layer takes the result and leaves, since nothing behind it is held here.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from splitfl.cut import Plan, Void, cache_among, count_positions, entrance, module_at
from splitfl.errors import WireError
from splitfl.link import TrunkRequest, decoded
from splitfl.wire.coding import Coded


class _TrunkDone(Exception):
    """Leaves the forward pass at the trunk's end, carrying its output."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output


class CacheMismatchError(WireError):
    """A request names cache positions or rows that the held cache does not have."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a later `backward` needs: the graph's two ends (`keep`), or the request alone (`recompute`)."""

    request: TrunkRequest
    entry: torch.Tensor | None
    output: torch.Tensor | None

    @property
    def device_bytes(self) -> int:
        """A lower bound of what is held: input, and output where there is one. The graph in between comes on top."""
        held = [decoded(self.request.hidden), *([self.output] if self.output is not None else [])]
        return sum(tensor.nbytes for tensor in held)


class Trunk:
    """The owner's half of a cut model. Safe to call from several threads at once.

    Args:
        base: from `splitfl.load.load_trunk_side`: frozen, in eval mode.
        plan: the plan it was cut by.
    """

    def __init__(self, base: PreTrainedModel, plan: Plan) -> None:
        assert not base.training  # noqa: S101  dropout would make recompute differ from forward
        assert not any(p.requires_grad for p in base.parameters())  # noqa: S101  weights are never tuned here
        self.base, self.plan = base, plan
        self._entrance = entrance(base, plan.stack)
        first, last = plan.trunk_layers.start, plan.trunk_layers.stop - 1
        layers = module_at(base, plan.stack)
        self.device = next(layers[first].parameters()).device
        self.dtype = _main_dtype(layers[first])
        self.accepts = set(inspect.signature(self._entrance.forward).parameters)
        self._embedding_width = _embedding_width(base, plan)
        self._at_door = threading.local()
        layers[first].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[last].register_forward_hook(self._leave, with_kwargs=True)

    @staticmethod
    def rewind(cache: Cache, request: TrunkRequest) -> None:
        """Bring `cache` to the rows and the length that the party's own cache has.

        Raises:
            CacheMismatchError: it cannot be.
        """
        _rewind(cache, request)

    def new_cache(self) -> Cache:
        """An empty KV cache of the family's own kind."""
        cache = DynamicCache(config=self.base.config)
        for slot in cache.layers:
            if _is_window(slot):  # what a window has passed is kept until the next request: a draft may be taken back
                slot.activate_past_recording()
        return cache

    def forward(self, request: TrunkRequest, cache: Cache | None = None) -> torch.Tensor:
        """The trunk's output [B, T, D], without gradient.

        Raises:
            CacheMismatchError: `request.past` or `request.rows` does not fit `cache`.
        """
        if cache is not None:
            self.rewind(cache, request)
        with torch.no_grad():
            return self.run(decoded(request.hidden).to(self.device, self.dtype), request, cache)

    def forward_kept(self, request: TrunkRequest, *, recompute: bool) -> tuple[torch.Tensor, Kept]:
        """The trunk's output and what its backward will need."""
        if recompute:
            return self.forward(request), Kept(request=request, entry=None, output=None)
        entry = decoded(request.hidden).to(self.device, self.dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            output = self.run(entry, request, None)
        return output.detach(), Kept(request=request, entry=entry, output=output)

    def backward(self, kept: Kept, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient at the trunk's input [B, T, D], from the one at its output."""
        if kept.output is None:
            _, kept = self.forward_kept(kept.request, recompute=False)
        assert kept.entry is not None  # noqa: S101
        assert kept.output is not None  # noqa: S101
        (result,) = torch.autograd.grad(kept.output, kept.entry, gradient.to(kept.output.device, kept.output.dtype))
        return result

    def run(self, hidden: torch.Tensor, request: TrunkRequest, cache: Cache | None) -> torch.Tensor:
        """The trunk's output for `hidden` [B, T, D], which is on its device; gradients as the caller has set them."""
        batch, length, _ = hidden.shape
        # Not a number, so that whatever a layer took of it besides the state at the door would show.
        stand_in = torch.full((), torch.nan, device=self.device, dtype=self.dtype)
        stand_in = stand_in.expand(batch, length, self._embedding_width)
        arguments: dict[str, Any] = {
            "inputs_embeds": stand_in,
            "attention_mask": None if request.mask is None else request.mask.to(self.device, torch.int64),
            "position_ids": None if request.positions is None else request.positions.to(self.device, torch.int64),
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        self._at_door.hidden = hidden
        try:
            self._entrance(**{name: value for name, value in arguments.items() if name in self.accepts})
        except _TrunkDone as done:
            return done.output
        finally:
            self._at_door.hidden = None
        raise AssertionError("the trunk's last layer was not reached")

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = self._at_door.hidden
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _leave(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        cache = cache_among(args, kwargs)
        if cache is not None:
            for index in range(self.plan.trunk_layers.stop, self.plan.layers):
                count_positions(cache, index, hidden)
        raise _TrunkDone(hidden)


def _main_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of most of a layer's numbers: some families keep a router or a norm in float32 whatever is asked."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _embedding_width(base: PreTrainedModel, plan: Plan) -> int:
    """Width that the embedding stage expects, before any projection to the width of the hidden state."""
    widths = (getattr(module, "embedding_dim", None) for module in base.modules() if isinstance(module, Void))
    return next((int(width) for width in widths if width is not None), plan.width)


def _rewind(cache: Cache, request: TrunkRequest) -> None:
    """Bring `cache` to the rows and the length that the party's own cache has."""
    length = cache.get_seq_length()
    if request.past > length:
        raise CacheMismatchError(
            f"The cache holds {length} positions, the request goes on from {request.past}.",
            expected=f"at most {length}",
        )
    if request.rows is not None:
        held = _rows_of(cache)
        if held is not None and max(request.rows) >= held:
            raise CacheMismatchError(f"The request names row {max(request.rows)} of a cache of {held} rows.")
        cache.reorder_cache(torch.tensor(request.rows))
    surplus = length - request.past
    try:
        if any(_is_window(slot) and _lacks(slot, surplus) for slot in cache.layers):
            raise RuntimeError  # the library would go on with what is left
        for slot in cache.layers:
            if surplus or (_is_window(slot) and slot.is_initialized):
                slot.crop(-surplus)
    except RuntimeError as error:
        raise CacheMismatchError(
            f"The cache cannot be cut back from {length} to {request.past} positions: "
            "a sliding window has passed, or a layer holds a state instead of positions.",
            hint="generate without a method that takes tokens back",
        ) from error


def _is_window(slot: Any) -> bool:
    """Whether a slot keeps the last positions of a sliding window, and nothing else."""
    return isinstance(slot, DynamicSlidingWindowLayer) and not isinstance(slot, LinearAttentionCacheLayerMixin)


def _lacks(slot: Any, surplus: int) -> bool:
    """Whether a window's slot no longer holds what it would need without its last `surplus` positions."""
    left = slot.get_seq_length() - surplus
    return slot.is_initialized and slot.keys.shape[-2] - surplus < min(left, slot.sliding_window - 1)


def _rows_of(cache: Cache) -> int | None:
    """Rows that the cache holds; None if nothing was put into it yet."""
    for slot in cache.layers:
        states = [getattr(slot, "keys", None), *getattr(slot, "conv_states", {}).values()]
        states += getattr(slot, "recurrent_states", {}).values()
        for state in states:
            if state is not None and state.numel():
                return len(state)
    return None


class LocalLink:
    """A `splitfl.link.TrunkLink` straight into a trunk of the same process: nothing crosses a wire."""

    def __init__(self, trunk: Trunk, *, recompute: bool = False) -> None:
        self.trunk, self.recompute = trunk, recompute
        self._kept: dict[int, Kept] = {}
        self._caches: dict[int, Cache] = {}
        self._steps = 0

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """See `splitfl.link.TrunkLink`."""
        self._steps += 1
        request = replace(request, hidden=decoded(request.hidden))
        if request.keep:
            output, self._kept[self._steps] = self.trunk.forward_kept(request, recompute=self.recompute)
            return output, self._steps
        cache = None
        if request.cache is not None:
            if request.cache not in self._caches:
                self._caches[request.cache] = self.trunk.new_cache()
            cache = self._caches[request.cache]
        return self.trunk.forward(request, cache), self._steps

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """See `splitfl.link.TrunkLink`."""
        return self.trunk.backward(self._kept.pop(step), decoded(gradient))

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """See `splitfl.link.TrunkLink`."""
        for number in caches:
            self._caches.pop(number, None)
        for number in steps:
            self._kept.pop(number, None)
