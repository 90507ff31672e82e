"""Which row each `Sent` was. Only scoring and controls read this; no attack is handed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class TrueRow:
    """The row behind one `Sent`."""

    number: int
    """That of the `Sent`."""
    dataset: Literal["train", "held-out"]
    row: int
    """Number of the example in its data set, from 0: the same row in another epoch has the same one."""
    ids: torch.Tensor
    """[T] int64 token ids; special ones included."""
    labels: torch.Tensor | int
    """[T] int64, -100 where the loss does not count; or the class."""
    special: torch.Tensor
    """[T] bool: special tokens and padding, which no score counts."""
