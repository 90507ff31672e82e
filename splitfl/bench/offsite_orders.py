"""What `splitfl bench offsite` asks of the processes whose speed and memory it measures (`party/offsite_side.py`)."""

from __future__ import annotations

from typing import TypeAlias

from splitfl.bench.orders import Line, Peak, Step


class SideStart(Line, frozen=True, kw_only=True):
    """What a process opens: the first argument of its command line."""

    settings: str
    """A TOML file of `splitfl tune` options."""
    whole: str | None = None
    """Model directory: LoRA on all layers of the whole model; None takes the emulator that the settings name."""


class CountFlops(Line, frozen=True, kw_only=True, tag="flops"):
    """Count the floating-point operations of one training step on a batch of this shape."""

    rows: int
    length: int


SideOrder: TypeAlias = Step | CountFlops | Peak


class Opened(Line, frozen=True, kw_only=True):
    """The process has its model and can begin."""

    base_rss: int
    """Resident bytes with the libraries imported, before a model was there."""
    trainable: int
    parameters: int


class Counted(Line, frozen=True, kw_only=True):
    """Operations of one step, forward and backward: matrix products and attention, as torch counts them."""

    flops: int
