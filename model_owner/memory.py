"""One byte budget for everything the owner holds between requests: kept graphs, inputs to recompute from, KV caches."""

from __future__ import annotations

import threading

import torch

from model_owner.trunk import Trunk
from splitfl.link import TrunkRequest

_PROBE_TOKENS = 8


class MemoryBudget:
    """Bytes that may be held; asking is atomic."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._lock = threading.Lock()

    def take(self, amount: int) -> bool:
        """Reserve `amount` bytes, or return False and reserve nothing."""
        with self._lock:
            if self.used + amount > self.limit:
                return False
            self.used += amount
            return True

    def give_back(self, amount: int) -> None:
        """Return bytes reserved with `take`."""
        with self._lock:
            self.used -= amount


def graph_bytes_per_token(trunk: Trunk) -> int:
    """Measure what autograd keeps for one token between forward and backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in trunk.base.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in trunk.base.buffers()}
    held: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _, kept = trunk.forward_kept(_probe(trunk), recompute=False)
    total = sum(held.values())
    del kept
    return max(total // _PROBE_TOKENS, 1)


def cache_bytes_per_token(trunk: Trunk) -> int:
    """Measure what one position of one row takes in the KV cache."""
    cache = trunk.new_cache()
    trunk.forward(_probe(trunk), cache)
    total = sum(
        tensor.nbytes
        for slot in cache.layers
        for tensor in (getattr(slot, "keys", None), getattr(slot, "values", None))
        if isinstance(tensor, torch.Tensor)
    )
    return max(total // _PROBE_TOKENS, 1)


def _probe(trunk: Trunk) -> TrunkRequest:
    hidden = torch.zeros(1, _PROBE_TOKENS, trunk.plan.width, dtype=trunk.dtype)
    return TrunkRequest(hidden=hidden)
