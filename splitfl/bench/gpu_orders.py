"""What `splitfl bench gpu` says to the process that is measured, and its answer: JSON lines."""

from __future__ import annotations

from splitfl.bench.orders import Line


class GpuStart(Line, frozen=True, kw_only=True):
    """First argument of the process: the model, and where it is."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    dtype: str
    device: str
    """Of the trunk, and of the whole model."""
    party_device: str
    threads: int


class GpuMeasure(Line, frozen=True, kw_only=True):
    """Measure all there is, with a batch of this shape."""

    rows: int
    length: int
    steps: int
    """Repetitions that count."""
    new_tokens: int
    matrix: int


class GpuMeasured(Line, frozen=True, kw_only=True):
    """Medians, in seconds."""

    parameters: int
    """Of the trunk."""
    flops: float
    """Of forward and input gradient of the trunk, its matrix products alone."""
    ceiling: float
    """FLOP/s of one large matrix product."""
    owner_s: float
    bare_s: float
    whole_step_s: float
    split_step_s: float
    whole_text_s: float
    split_text_s: float
    step_bytes: int
    loss_difference: float
    equal_tokens: int
    new_tokens: int
