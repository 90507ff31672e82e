"""One byte budget for what the owner holds between requests: kept graphs, inputs to recompute from, KV caches.

Nobody may take all of it: a party holds at most `GREED` times what it leaves free. One party alone can use 80% of the
budget, and however much some hold, a newcomer still finds room.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from model_owner.trunk import Trunk
from splitfl.link import TrunkRequest

GREED = 4
_PROBE_TOKENS = 8
_LONG_PROBE_TOKENS = 40


class MemoryBudget:
    """Bytes that may be held, by all parties together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.lock = threading.Lock()


class Share:
    """What one party holds of a budget; asking is atomic."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget, self.used = budget, 0

    def take(self, amount: int) -> bool:
        """Reserve `amount` bytes, or return False and reserve nothing."""
        with self.budget.lock:
            free = self.budget.limit - self.budget.used - amount
            if free < 0 or self.used + amount > GREED * free:
                return False
            self.budget.used += amount
            self.used += amount
            return True

    def give_back(self, amount: int) -> None:
        """Return bytes reserved with `take`."""
        with self.budget.lock:
            self.budget.used -= amount
            self.used -= amount


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a trunk's requests hold, measured at start-up."""

    graph: int
    """Bytes of a kept graph for one token of a short row."""
    graph_per_position: float = 0.0
    """What each further position of its row adds to that: attention weights and masks grow with the square."""
    cache: int
    """Bytes of a KV cache for one position of one row; 0 if the model makes none."""

    def of_graph(self, rows: int, length: int) -> int:
        """Bytes of the graph of `rows` rows of `length` positions."""
        return round(rows * length * (self.graph + self.graph_per_position * length))


def measure(trunk: Trunk, *, caches: bool) -> Costs:
    """The costs of `trunk`; `caches` says whether it is served with KV caches."""
    longer = min(_LONG_PROBE_TOKENS, trunk.plan.max_length or _LONG_PROBE_TOKENS)
    at_short, at_long = (_graph_bytes_per_token(trunk, length) for length in (_PROBE_TOKENS, longer))
    slope = max((at_long - at_short) / max(longer - _PROBE_TOKENS, 1), 0.0)
    return Costs(
        graph=max(round(at_short - slope * _PROBE_TOKENS), 1),
        graph_per_position=slope,
        cache=_cache_bytes_per_token(trunk) if caches else 0,
    )


def _graph_bytes_per_token(trunk: Trunk, length: int) -> float:
    """Measure what autograd keeps for one token between forward and backward, weights not counted."""
    weights = {_storage(p).data_ptr() for p in trunk.base.parameters()}
    weights |= {_storage(b).data_ptr() for b in trunk.base.buffers()}
    held: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _, kept = trunk.forward_kept(_probe(trunk, length), recompute=False)
    total = sum(held.values())
    del kept
    return total / length


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Where the numbers are; of a tensor that several processes share, this one's part."""
    local = getattr(tensor, "to_local", None)
    return (tensor if local is None else local()).untyped_storage()


def _cache_bytes_per_token(trunk: Trunk) -> int:
    """Measure what one position of one row takes in the KV cache."""
    cache = trunk.new_cache()
    trunk.forward(_probe(trunk, _PROBE_TOKENS), cache)
    total = sum(
        tensor.nbytes
        for slot in cache.layers
        for tensor in (getattr(slot, "keys", None), getattr(slot, "values", None))
        if isinstance(tensor, torch.Tensor)
    )
    return max(total // _PROBE_TOKENS, 1)


def _probe(trunk: Trunk, length: int) -> TrunkRequest:
    """One row, its first position padding: a mask costs memory of its own."""
    mask = torch.ones(1, length, dtype=torch.uint8)
    mask[0, 0] = 0
    return TrunkRequest(hidden=torch.zeros(1, length, trunk.plan.width, dtype=trunk.dtype), mask=mask)
