"""The options of `splitfl bench rules`; kept apart from those of the other benchmarks, which share the command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from splitfl.config_common import NOT_EMPTY
from splitfl.options import Panel, Settings, above, at_least, between

RULES_PANEL = Panel("splitfl bench rules")


@dataclass(frozen=True, kw_only=True)
class RulesSettings(Settings):
    """Which rules of combining adapters are compared, and over how many rounds."""

    rules: Annotated[tuple[str, ...], "Rule to compare. May be repeated. Default: every rule.", NOT_EMPTY,
                     RULES_PANEL] = ()  # fmt: skip
    rates: Annotated[tuple[float, ...], "Learning rate to try on the first seed. May be repeated. Default: three, by "
                     "what is trained.", above(0), RULES_PANEL] = ()  # fmt: skip
    parties: Annotated[int, "Parties of the federation.", between(2, 6), RULES_PANEL] = 4
    rounds: Annotated[int | None, "Rounds of every run. Default: 5.", at_least(1), RULES_PANEL] = None
    local_steps: Annotated[int | None, "Steps of a party in a round. Default: 4.", at_least(1), RULES_PANEL] = None
