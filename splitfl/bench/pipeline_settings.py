"""The options of `splitfl bench pipeline` and `link`; kept apart from those of the other benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.options import Panel, Settings, above, at_least

PIPELINE = Panel("splitfl bench pipeline and link")


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(Settings):
    """How steps are split, and over which links."""

    micro_batches: Annotated[
        tuple[int, ...], "Micro-batches of a step. May be repeated. Default: 4.", at_least(2), PIPELINE
    ] = (4,)
    rtt: Annotated[
        tuple[float, ...],
        "Round trip in milliseconds (link, generate). May be repeated. Default: 20 and 80.",
        above(0),
        PIPELINE,
    ] = (20.0, 80.0)
    mbit: Annotated[
        tuple[float, ...], "Million bits a second (link). May be repeated. Default: 100 and 1000.", above(0), PIPELINE
    ] = (100.0, 1000.0)
