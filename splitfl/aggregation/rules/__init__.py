"""The rules by name."""

from __future__ import annotations

from collections.abc import Mapping

from splitfl.aggregation.rule import Rule, with_options
from splitfl.aggregation.rules.cores import FedSB
from splitfl.aggregation.rules.dynamical import FeDLRT
from splitfl.aggregation.rules.means import FFA, FedIT, FedSA, RoLoRA
from splitfl.aggregation.rules.products import FRA, FlexLoRA, FRAThenFFA, LoRAFair
from splitfl.aggregation.rules.ranks import RBLA, HetLoRA
from splitfl.aggregation.rules.rotating import FedSVD
from splitfl.aggregation.rules.stacking import FedEx, FLoRA
from splitfl.errors import UsageError, nearest

DEFAULT_RULE = "rolora"
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        RoLoRA(),
        FedIT(),
        FFA(),
        FedSA(),
        FedSVD(),
        FedSB(),
        FeDLRT(),
        RBLA(),
        HetLoRA(),
        FLoRA(),
        FlexLoRA(),
        FRA(),
        FRAThenFFA(),
        FedEx(),
        LoRAFair(),
    )
}


def rule_named(name: str, options: Mapping[str, float | int | str] | None = None) -> Rule:
    """The rule `name`, with other options than its own if some are given.

    Raises:
        UsageError: no such rule, option or value.
    """
    if name not in RULES:
        raise UsageError(f"There is no aggregation rule {name!r}.", hint=nearest(name, RULES))
    return with_options(RULES[name], options or {})
