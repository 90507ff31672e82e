"""What lies between a party's remote trunk and the owner's trunk: one request, one reply, over whichever road.

`party.session.Session` is the road over the network; `model_owner.trunk.LocalLink` stays inside one process, for the
check that `splitfl kit` makes and for comparisons. A remote trunk cannot tell which one it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from splitfl.wire.coding import Coded


@dataclass(frozen=True, kw_only=True)
class TrunkRequest:
    """One pass through the trunk. B rows, T new positions, S cached plus new ones, D width of the cut."""

    hidden: torch.Tensor | Coded
    """[B, T, D], floating; or coded, once a mechanism has seen to it."""
    mask: torch.Tensor | None = None
    """[B, S] uint8, 1 where there is a token; None if nothing is padded."""
    positions: torch.Tensor | None = None
    """[B or 1, T] int32; None if they simply go on counting."""
    keep: bool = False
    """Whether `backward` will follow."""
    cache: int | None = None
    """Number of the KV cache to use; None for none."""
    past: int = 0
    """Positions of the cache to go on from."""
    rows: tuple[int, ...] | None = None
    """The cache's rows in their new order; None if they did not move."""
    overlap: bool = False
    """Whether whoever asks has other work to do while the answer is under way."""


def decoded(tensor: torch.Tensor | Coded) -> torch.Tensor:
    """The numbers that the receiver computes with."""
    return tensor.decode() if isinstance(tensor, Coded) else tensor


class TrunkLink(Protocol):
    """The road to a trunk."""

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        """The trunk's output [B, T, D] and the number of this step."""

    def backward(self, step: int, gradient: torch.Tensor | Coded) -> torch.Tensor:
        """Gradient at the trunk's input [B, T, D], given the one at its output; `step` was kept."""

    def release(self, *, caches: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> None:
        """Forget caches, and kept steps whose backward will not come."""
