"""What `splitfl bench aggregation` and `splitfl bench rounds` aim at, and whether a figure is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitfl.metrics import Result

BYTES, PARTY, COORDINATOR, OPENING, WRONG = (
    "bytes a value", "party", "coordinator", "opening the sum", "wrong values",
)  # fmt: skip
BYTES_NVFLARE, COORDINATOR_NVFLARE = "bytes beside NVFlare's", "coordinator beside NVFlare's"
SIGNED = "coordinator, signed updates"
TENSORS_BYTES, TENSORS_TIME = "bytes, 88 tensors", "party, 88 tensors"
SECONDS, LARGEST, MEMORY = "time", "values of the largest tensor", "memory beyond the updates"
ROUND_TIME, ROUND_CPU, ROUND_BYTES = "time of a round", "processor time, everybody", "bytes of a round"
HELD, GROWTH = "coordinator's memory", "its growth after two rounds"
LEFT = "files and threads left behind"


@dataclass(frozen=True)
class Goal:
    """A bound from above, on the figure itself or on its ratio to the reference."""

    bound: float
    of: Literal["value", "ratio"] = "ratio"


GOALS: dict[tuple[str, str], Goal] = {
    ("mask", BYTES): Goal(4.1, "value"),
    ("mask", WRONG): Goal(0, "value"),
    ("mask", PARTY): Goal(10, "value"),
    ("mask", COORDINATOR): Goal(2),
    ("mask", TENSORS_BYTES): Goal(1),
    ("mask", TENSORS_TIME): Goal(1.1),
    ("bfv public key", BYTES): Goal(16.2, "value"),
    ("bfv seeded", BYTES): Goal(8.2, "value"),
    **{
        (kind, metric): goal
        for kind in ("bfv public key", "bfv seeded")
        for metric, goal in (
            (WRONG, Goal(0, "value")),
            (BYTES_NVFLARE, Goal(0.286)),
            (COORDINATOR_NVFLARE, Goal(0.125)),
            (TENSORS_BYTES, Goal(1)),
            (TENSORS_TIME, Goal(1.1)),
        )
    },
    ("fra", SECONDS): Goal(10, "value"),
    ("fra", LARGEST): Goal(0.1),
    ("plain, 2 parties", ROUND_TIME): Goal(0.5, "value"),
    ("plain, 2 parties", ROUND_BYTES): Goal(17e6, "value"),
    ("mask, 50 parties", HELD): Goal(1),
    ("mask, 50 parties", LEFT): Goal(0, "value"),
    ("mask, 50 parties", GROWTH): Goal(1),
}
"""By kind of case (what stands before its colon) and metric. 3.5 times fewer bytes is a ratio of 0.286 to NVFlare's."""


def kind_of(case: str) -> str:
    """The kind of a case."""
    return case.partition(":")[0]


def figure(
    case: str, metric: str, value: float | str | None, unit: str, *, reference: float | None = None,
    ratio: float | None = None, full: bool = True,
) -> Result:  # fmt: skip
    """A figure with what is aimed at.

    Args:
        full: whether the case has the size that the aim is for.
    """
    goal = GOALS.get((kind_of(case), metric)) if full else None
    reach = goal.bound if goal is not None else None
    return Result(case=case, metric=metric, value=value, unit=unit, reference=reference, ratio=ratio, reach=reach)


def verdict(result: Result) -> str:
    """``met``, ``missed``, or nothing where nothing is aimed at or there is nothing to compare with."""
    goal = GOALS.get((kind_of(result.case), result.metric))
    if goal is None or result.reach is None:
        return ""
    found = result.value if goal.of == "value" else result.ratio
    if not isinstance(found, int | float):
        return ""
    return "met" if found <= goal.bound else "missed"
