"""How an owner's parties share it: options of `splitfl serve`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from splitfl.options import Panel, Settings, above

SHARING = Panel("What parties share (see docs/sharing.md)")

Batching: TypeAlias = Literal["off", "exact", "auto", "on"]


@dataclass(frozen=True, kw_only=True)
class Sharing(Settings):
    """Options of `splitfl serve`."""

    parties_config: Annotated[
        Path | None, "TOML file of weights, rates and budgets. Default: parties.toml in --parties, if there.", SHARING
    ] = None
    batching: Annotated[
        Batching,
        "Rows of several parties in one pass where that is measured to gain: never, where it is equal to the bit, "
        "there and when decoding, or always.",
        SHARING,
    ] = "auto"
    cache_lease: Annotated[
        float | None, "Seconds after which an idle KV cache is dropped. Default: with its session.", above(0), SHARING
    ] = None
    deadline: Annotated[
        float, "Seconds after which a request that its party has not repeated is dropped.", above(60), SHARING
    ] = 150.0
