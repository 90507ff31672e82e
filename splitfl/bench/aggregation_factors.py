"""The rule `fra` on adapters of the size of a 7B model: time, memory, and the largest tensor that it ever makes."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.rules import rule_named
from splitfl.aggregation.state import State
from splitfl.bench.aggregation_orders import StackFactors
from splitfl.metrics import peak_rss_bytes


class Largest(TorchDispatchMode):
    """Watches every operation for the largest tensor that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and look at what came out."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


def stack_factors(order: StackFactors) -> dict[str, float]:
    """One aggregation of random adapters; then one module again, watched, and one module the dense way.

    Returns:
        Milliseconds of the processor and of the wall clock, bytes, and numbers of values.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def adapter() -> Update:
        return Update({
            f"layers.{number:03d}": Pair(
                torch.randn(order.rank, order.width, generator=generator) / math.sqrt(order.width),
                torch.randn(order.width, order.rank, generator=generator), 2.0,
            ) for number in range(order.modules)
        })  # fmt: skip

    updates = [adapter() for _ in range(order.parties)]
    state, rule, weights = State(adapter=updates[0], seed=0), rule_named("fra", {}), [1.0] * order.parties
    before, cpu, wall = peak_rss_bytes(), time.process_time(), time.perf_counter()
    rule.from_all(state, updates, weights, 0)
    figures = {
        "fra.cpu": 1000 * (time.process_time() - cpu),
        "fra.wall": 1000 * (time.perf_counter() - wall),
        "fra.memory": peak_rss_bytes() - before,
        "fra.updates": 4 * order.parties * 2 * order.modules * order.width * order.rank,
    }
    first = "layers.000"
    alone = [Update({first: update.pairs[first]}) for update in updates]
    with Largest() as largest:
        rule.from_all(State(adapter=alone[0], seed=0), alone, weights, 0)
    cpu = time.process_time()
    dense = sum(pair.wide()[0] @ pair.wide()[1] for pair in (update.pairs[first] for update in alone))
    assert isinstance(dense, torch.Tensor)  # noqa: S101  there is a party
    figures["fra.dense"] = 1000 * (time.process_time() - cpu) * order.modules
    return figures | {"fra.largest": largest.values, "fra.product": dense.numel()}
