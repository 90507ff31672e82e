"""The options of `splitfl bench generate`; kept apart from those of the other benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.options import Panel, Settings, between

GENERATE = Panel("splitfl bench generate")


@dataclass(frozen=True, kw_only=True)
class GenerateBenchSettings(Settings):
    """How many tokens are guessed at a time."""

    guesses: Annotated[
        tuple[int, ...], "Guesses for one pass. May be repeated. Default: 4 and 8.", between(1, 64), GENERATE
    ] = (4, 8)
