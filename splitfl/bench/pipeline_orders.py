"""What `splitfl bench pipeline` says to the process that trains with kept replies, and its answers: JSON lines."""

from __future__ import annotations

from splitfl.bench.orders import Line


class KeptStart(Line, frozen=True, kw_only=True):
    """First argument of the process."""

    kit: str
    folder: str
    """For the replies, and what training leaves."""
    rows: int
    length: int
    batches: int
    """Of one epoch."""
    dtype: str
    threads: int


class Epochs(Line, frozen=True, kw_only=True):
    """Train two epochs with the run's own trainer, and one in a bare loop; the first epoch is not timed."""


class EpochsTimed(Line, frozen=True, kw_only=True):
    """Seconds of one epoch each."""

    kept: float
    """The second epoch of the run's own trainer, on the replies that are kept on disk."""
    local: float
    """The same layers in a bare loop, on features that lie ready in memory."""
