"""The options of `splitfl bench utility`; kept apart from those of the other benchmarks, which share the command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.options import Check, Panel, Settings, at_least

UTILITY = Panel("splitfl bench utility")

_NOT_EMPTY = Check(test=bool, expected="some text")


@dataclass(frozen=True, kw_only=True)
class UtilitySettings(Settings):
    """Which runs the comparison of designs is made of."""

    tasks: Annotated[tuple[str, ...], "Task to run: polarity, tweets or answers; for offsite answers, restaurants, "
                     "spam or polarity; for rules polarity or answers. May be repeated. Default: all whose model and "
                     "rows are here.", _NOT_EMPTY, UTILITY] = ()  # fmt: skip
    designs: Annotated[tuple[str, ...], "Protocol to run beside the reference. May be repeated. Default: all three.",
                       _NOT_EMPTY, UTILITY] = ()  # fmt: skip
    levels: Annotated[tuple[str, ...], "none, int4, decorrelate-0, epsilon-8, or r/sigma of the noise: a token's norm "
                      "over the noise's standard deviation. May be repeated. Default: these, and 64, 32, 16, 8.",
                      _NOT_EMPTY, UTILITY] = ()  # fmt: skip
    seeds: Annotated[tuple[int, ...], "Seed of a run. May be repeated. Default: 0, 1 and 2.", at_least(0), UTILITY] = ()
    max_steps: Annotated[int | None, "Training steps of every run. Default: each task's own.", at_least(1), UTILITY] = (
        None
    )
    workers: Annotated[int, "Runs at the same time, each with one thread.", at_least(1), UTILITY] = 2
    quick: Annotated[bool, "Few rows and steps, one seed, levels none and 16: to see that it works.", UTILITY] = False
