"""Several requests in one pass of the frozen trunk: rows of different parties, of different lengths.

Nothing in a frozen trunk in eval mode looks from one row at another, so a row's result does not depend on who shares
the pass: it differs from that of a pass of its own by rounding only, because kernels add in another order when shapes
differ.

- Without a cache, rows are filled up on the right, and the mask says so: each keeps the positions that it had.
- With caches, each session keeps its own, as it is without batching. A `_JointLayer` stands before the sessions' own
  layers for one pass: it hands each its new keys and values, and gives the model what they hold, filled up on the left
  so that all end at the same column. Windows then slide over the same positions as before. Filling up costs one copy
  of keys and values a step; one joint cache for a fixed set of sessions would save it, but binds sessions that come and
  go, rewind and expire by themselves (docs/log.md has both measured).

B rows, T new positions, S cached plus new positions, D width of the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from model_owner.trunk import Kept, Trunk
from splitfl.link import TrunkRequest, decoded

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


class _JointLayer(CacheLayerMixin):
    """One layer of several caches, for one pass.

    Args:
        parts: the layers of the caches, of one class.
        rows: of each.
    """

    def __init__(self, parts: Sequence[Any], rows: Sequence[int]) -> None:
        super().__init__()
        self.parts, self.rows = parts, list(rows)
        self.is_sliding = parts[0].is_sliding
        self.is_initialized = True
        self._longest = max(parts, key=lambda part: part.get_seq_length())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the parts see to themselves."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to each part, and return all that they hold, filled up on the left: [B, heads, S, size of a head]."""
        split = zip(self.parts, key_states.split(self.rows), value_states.split(self.rows), strict=True)
        held = [part.update(keys, values, *args, **kwargs) for part, keys, values in split]
        return _stacked([keys for keys, _ in held]), _stacked([values for _, values in held])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of the longest: all end where it ends."""
        length, offset = self._longest.get_mask_sizes(query_length)
        return int(length), int(offset)

    def get_seq_length(self) -> int:
        """That of the longest."""
        return int(self._longest.get_seq_length())

    def get_max_length(self) -> int:
        """None."""
        return -1


def _stacked(states: list[torch.Tensor]) -> torch.Tensor:
    longest = max(state.shape[-2] for state in states)
    if all(state.shape[-2] == longest for state in states):
        return torch.cat(states)
    first = states[0]
    stacked = first.new_zeros(sum(map(len, states)), first.shape[1], longest, first.shape[3])
    row = 0
    for state in states:
        stacked[row : row + len(state), :, longest - state.shape[-2] :] = state
        row += len(state)
    return stacked


@dataclass(frozen=True)
class Snapshot:
    """What a cache holds, to go back to. No copy: these layers replace their tensors and never write to them."""

    layers: list[tuple[Any, dict[str, Any]]]

    @classmethod
    def of(cls, cache: Cache) -> Snapshot:
        """Of a cache that `joinable` has accepted."""
        return cls([(layer, dict(vars(layer))) for layer in cache.layers])

    def restore(self) -> None:
        """The cache is as it was."""
        for layer, state in self.layers:
            vars(layer).update(state)


def joinable(trunk: Trunk, request: TrunkRequest, cache: Cache | None) -> bool:
    """Whether a request means the same in one pass with others."""
    if cache is None:
        # Positions without a mask may mean a packed batch, where the library looks for their restarts.
        return (request.positions is None) or (request.mask is not None)
    # Positions that the library would work out from a mask, here from one that was filled up.
    unclear = request.positions is None and request.mask is not None and "position_ids" in trunk.accepts
    return request.past > 0 and not unclear and all(type(layer) in _PLAIN for layer in cache.layers)


def forward_together(trunk: Trunk, requests: Sequence[TrunkRequest]) -> list[torch.Tensor]:
    """The trunk's output [B, T, D] for each, without gradient, without caches."""
    with torch.no_grad():
        output = trunk.run(*_filled_right(trunk, requests), None)
    return _apart(output, requests)


def backward_together(trunk: Trunk, kept: Sequence[Kept], gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient [B, T, D] at the trunk's input for each, from those at its output; forwards are computed again."""
    requests = [one.request for one in kept]
    hidden, joint = _filled_right(trunk, requests)
    entry = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        output = trunk.run(entry, joint, None)
    above = torch.zeros_like(output)
    row = 0
    for gradient in gradients:
        above[row : row + len(gradient), : gradient.shape[1]] = gradient.to(trunk.device, output.dtype)
        row += len(gradient)
    (result,) = torch.autograd.grad(output, entry, above)
    return _apart(result, requests)


def decode_together(trunk: Trunk, requests: Sequence[TrunkRequest], caches: Sequence[Cache]) -> list[torch.Tensor]:
    """The trunk's output [B, T, D] for each, going on from its own cache; T is the same for all.

    Raises:
        CacheMismatchError: some request does not fit its cache.
    """
    for request, cache in zip(requests, caches, strict=True):
        trunk.rewind(cache, request)
    hidden = torch.cat([decoded(request.hidden).to(trunk.device, trunk.dtype) for request in requests])
    rows, new = [len(decoded(request.hidden)) for request in requests], hidden.shape[1]
    total = max(request.past for request in requests) + new
    plain = all(request.mask is None and request.past + new == total for request in requests)
    mask = None if plain else torch.zeros(sum(rows), total, dtype=torch.uint8)
    positions = torch.zeros(sum(rows), new, dtype=torch.int32)
    row = 0
    for count, request in zip(rows, requests, strict=True):
        if mask is not None:
            mask[row : row + count, total - request.past - new :] = 1 if request.mask is None else request.mask
        ordinary = torch.arange(request.past, request.past + new, dtype=torch.int32)
        positions[row : row + count] = ordinary if request.positions is None else request.positions
        row += count
    joint = replace(requests[0], hidden=hidden, mask=mask, positions=positions, rows=None, past=total - new)
    layers = [_JointLayer(parts, rows) for parts in zip(*(cache.layers for cache in caches), strict=True)]
    with torch.no_grad():
        return _apart(trunk.run(hidden, joint, Cache(layers=layers)), requests)


def _filled_right(trunk: Trunk, requests: Sequence[TrunkRequest]) -> tuple[torch.Tensor, TrunkRequest]:
    """All rows in one batch, and what is asked of it."""
    states = [decoded(request.hidden) for request in requests]
    longest, rows = max(state.shape[1] for state in states), sum(map(len, states))
    hidden = torch.zeros(rows, longest, states[0].shape[2], device=trunk.device, dtype=trunk.dtype)
    plain = all(
        request.mask is None and state.shape[1] == longest for request, state in zip(requests, states, strict=True)
    )
    mask = None if plain else torch.zeros(rows, longest, dtype=torch.uint8)
    positions = None if requests[0].positions is None else torch.zeros(rows, longest, dtype=torch.int32)
    row = 0
    for request, state in zip(requests, states, strict=True):
        place = slice(row, row + len(state)), slice(state.shape[1])
        hidden[place] = state.to(trunk.device, trunk.dtype)
        if mask is not None:
            mask[place] = 1 if request.mask is None else request.mask
        if positions is not None:
            assert request.positions is not None  # noqa: S101  requests of one key agree
            positions[place] = request.positions
        row += len(state)
    return hidden, TrunkRequest(hidden=hidden, mask=mask, positions=positions)


def _apart(result: torch.Tensor, requests: Sequence[TrunkRequest]) -> list[torch.Tensor]:
    """The rows of each request, without what was filled up."""
    shapes = [decoded(request.hidden).shape for request in requests]
    parts = result.split([shape[0] for shape in shapes])
    return [part[:, : shape[1]] for part, shape in zip(parts, shapes, strict=True)]
