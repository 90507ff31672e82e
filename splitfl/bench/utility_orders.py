"""What `splitfl bench utility` asks of its workers (`party/utility_side.py`), and their answers: a JSON line each."""

from __future__ import annotations

from typing import TypeAlias

from splitfl.bench.orders import Line


class MeasureCut(Line, frozen=True, kw_only=True, tag="measure"):
    """Pass training rows through the kit's bottom, sending nothing, and say how large activations are at the cut."""

    settings: str
    """A TOML file of `splitfl tune` options; kit, rows and lengths are read from it."""
    rows: int
    """Look at so many rows at most."""


class TrainCell(Line, frozen=True, kw_only=True, tag="train"):
    """Do one run."""

    settings: str
    """A TOML file of `splitfl tune` options."""
    whole: str | None = None
    """Model directory: train LoRA on all layers of the whole model instead, with no owner. The reference."""


UtilityOrder: TypeAlias = MeasureCut | TrainCell


class UtilityReady(Line, frozen=True, kw_only=True):
    """The libraries are imported."""

    pid: int


class CutMeasured(Line, frozen=True, kw_only=True):
    """Of the training rows."""

    norm: float
    """Root mean square over tokens of the L2 norm of a token's activation at the cut."""
    row_norms: tuple[float, ...]
    """L2 norm of each row looked at, all its tokens together."""
    median_length: float
    """Tokens of a row, over all rows."""
    train_rows: int
    held_out_rows: int
    vocabulary: int


class Trained(Line, frozen=True, kw_only=True):
    """A run is over."""

    figures: dict[str, float]
    """Metric to value; the names are those of `splitfl.bench.utility_cases`."""
    failed: str = ""
    """Why it was not done, as the run's error says; then there are no figures."""
