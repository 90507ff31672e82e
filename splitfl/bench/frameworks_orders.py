"""What `splitfl bench frameworks` asks of the process that counts (`party/frameworks_side.py`): a JSON line each."""

from __future__ import annotations

import msgspec

from splitfl.bench.orders import Line


class CountFlops(Line, frozen=True, kw_only=True):
    """Count what one step costs a party with these settings."""

    settings: str
    """File of settings for `splitfl tune`."""


class Flops(Line, frozen=True, kw_only=True):
    """Floating-point operations of one party, matrix products and attention, as torch counts them."""

    step: int
    """Forward and backward of one batch of training rows."""
    answers: int = 0
    """Forward of all public rows; fed-kd alone."""
    lesson: int = 0
    """Forward and backward of one batch of public rows; likewise."""
    batches: int = 0
    """Batches of one pass over the public rows."""
    failed: str = ""


class Ready(Line, frozen=True, kw_only=True):
    """The libraries are imported."""

    pid: int


decode_order = msgspec.json.Decoder(CountFlops).decode
