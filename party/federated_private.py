"""DP-SGD in a federation: one bound for all updates that this party hands over, in all rounds.

Every local step of every round is one step of the Gaussian mechanism on a Poisson sample of this party's rows (or
persons), so all of them together are what `party.private_plan` accounts for: rounds x local steps. Parties' rows are
different ones, so no other party's steps count. What is made of the updates (sums, states, adapters, this party's own
adapter and the scores of it) is made of noised gradients alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from party.bookkeeping import DataSet
from party.federated_bounds import Promise
from party.offline import ADVERSARY, check_private
from party.private_plan import AdapterClaim, PrivatePlan, adapter_rho, plan_private
from splitfl.aggregation.rule import Rule, check_combination
from splitfl.aggregation.rules import rule_named
from splitfl.config import TuneSettings
from splitfl.errors import UsageError
from splitfl.privacy.ledger import Release
from splitfl.rounds.schedule import sums_in

_WHO_SEES = "whoever sees this party's updates: the coordinator, the other parties, whoever gets an adapter"


@dataclass(frozen=True, kw_only=True)
class FederatedClaim(AdapterClaim):
    """A claim about all updates of a federation."""

    sums: int

    def _terms(self, releases: str) -> str:
        return (
            f"delta {self.delta:g}; unit: one {self.whose}; neighbours: {self.neighbours}; adversary: "
            f"{self.adversary}; releases: all updates of this party in {self.sums} sums and what is made of them, "
            f"after {self.steps} steps at sampling rate {self.sample_rate:.4g}; not in it: scores on held-out rows"
        )


@dataclass(frozen=True, kw_only=True)
class FederatedPlan(PrivatePlan):
    """How all updates of a party are protected."""

    sums: int
    local_steps: int

    @property
    def claim(self) -> FederatedClaim:
        """What is promised, with everything that belongs to it."""
        one = vars(super().claim)
        return FederatedClaim(**{**one, "channel": "updates", "adversary": _WHO_SEES}, sums=self.sums)

    def lines(self) -> list[tuple[str, str]]:
        """What is said of it before the run: label and text."""
        return [("rounds", f"{self.sums} sums, {self.local_steps} steps for each"), *super().lines()]


def plan_federated(settings: TuneSettings, train: DataSet) -> FederatedPlan:
    """Work out the noise of all local steps of all rounds.

    Raises:
        UsageError: settings, or a rule, under which the bound would not hold; as `plan_private`.
    """
    check_private(settings)
    rule = rule_named(settings.rule, settings.rule_options())
    check_combination(rule, settings.sum, dp=True)
    _check_rule(rule)
    assert settings.dp_rounds is not None  # noqa: S101  the settings saw to it
    assert settings.dp_clip is not None  # noqa: S101
    assert settings.dp_delta is not None  # noqa: S101
    sums, units = sums_in(rule, settings.dp_rounds), len(set(train.units))
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    local_steps = settings.local_steps or math.ceil(units / min(batch, units))
    plan = plan_private(
        units=train.units,
        unit=train.unit,
        batch=batch,
        max_steps=sums * local_steps,
        epochs=1.0,
        clip=settings.dp_clip,
        delta=settings.dp_delta,
        noise_multiplier=settings.dp_noise_multiplier,
        epsilon=settings.dp_epsilon,
    )
    return FederatedPlan(**vars(plan), sums=sums, local_steps=local_steps)


def _check_rule(rule: Rule) -> None:
    for number in range(2):
        for step in rule.steps(number):
            if step.does == "gradient" or step.trains == "core":
                what = "sends a gradient as it is" if step.does == "gradient" else "trains a core between the factors"
                raise UsageError(
                    f"--rule {rule.name} with DP-SGD: it {what}, and rows are clipped one by one in the two LoRA "
                    "matrices and a new head alone.",
                    hint="choose --rule ffa or --rule rolora",
                )


def terms_of_plan(plan: FederatedPlan) -> dict[str, Any]:
    """What all updates must have in common for the plan's bound to hold."""
    names = ("noise_multiplier", "clip", "sample_rate", "unit", "units", "delta", "sums", "local_steps")
    return {name: getattr(plan, name) for name in names}


def promise_of_steps(plan: FederatedPlan, train: DataSet, run: str) -> Promise:
    """The plan as what a party is held to."""
    return Promise(
        sums=plan.sums,
        claim=plan.claim.sentence(),
        release=Release(
            release_id=f"updates:{run}",
            dataset=train.fingerprint,
            unit=train.unit,
            units=None,
            channel="adapter",
            mechanism=f"{plan.mechanism} in {plan.sums} sums",
            sensitivity=None,  # rho comes from all steps together, not from one sensitivity and one sigma
            sigma=None,
            rho=adapter_rho(plan.noise_multiplier, plan.sample_rate, plan.steps),
            adversary=ADVERSARY,
            run=run,
        ),
        terms=terms_of_plan(plan),
        units=plan.units,
    )


def length_preview(plan: FederatedPlan, values: int) -> str:
    """How long the noise on a step is, next to the longest gradient: `values` are what a step trains at most."""
    ratio = plan.noise_multiplier * math.sqrt(values) / plan.expected
    return (
        f"up to {values:,} values are trained in a step; the noise on its whole gradient is {ratio:.3g} times as long "
        "as the gradient can be at most"
    )
