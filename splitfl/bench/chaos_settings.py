"""The options of `splitfl bench chaos`, `soak` and `hostile`; kept apart from those of the other benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.options import Panel, Settings, above, at_least

CHAOS = Panel("splitfl bench chaos, soak and hostile")


@dataclass(frozen=True, kw_only=True)
class ChaosSettings(Settings):
    """How long and how often things are broken."""

    minutes: Annotated[float, "How long parties are disturbed (soak).", above(0), CHAOS] = 60.0
    runs: Annotated[int, "Seeded schedules of faults for each case (chaos).", at_least(1), CHAOS] = 5
    connections: Annotated[int, "Connections that say nothing, at one time (hostile).", at_least(1), CHAOS] = 10_000
