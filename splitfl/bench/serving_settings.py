"""The options of `splitfl bench serving`; kept apart from those of the other benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.options import Panel, Settings, above, at_least

SERVING = Panel("splitfl bench serving")


@dataclass(frozen=True, kw_only=True)
class ServingSettings(Settings):
    """How many parties ask at once, and for how long."""

    crowd: Annotated[
        tuple[int, ...], "Parties that train at one time. May be repeated.", at_least(1), SERVING
    ] = (2, 8, 32)  # fmt: skip
    seconds: Annotated[float, "Seconds that count of each turn.", above(0), SERVING] = 10.0
    turns: Annotated[int, "Turns of each of the two that are compared, by turns.", at_least(1), SERVING] = 3
