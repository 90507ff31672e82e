"""The options of `splitfl bench gpu`; kept apart from those of the other benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from splitfl.config_common import NOT_EMPTY
from splitfl.options import Panel, Settings

GPU = Panel("splitfl bench gpu")


@dataclass(frozen=True, kw_only=True)
class GpuSettings(Settings):
    """Shapes of real models, with random weights made in place."""

    size: Annotated[
        tuple[str, ...], "Shape to measure: toy, 1B, 3B or 8B. May be repeated. Default: 1B, 3B, 8B.", NOT_EMPTY, GPU
    ] = ("1B", "3B", "8B")
    party_device: Annotated[
        Literal["same", "cpu"], "Where the party computes: on the owner's device, or on the processor.", GPU
    ] = "same"
