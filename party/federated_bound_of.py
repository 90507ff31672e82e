"""Which bound a party's updates have, if any: DP-SGD on its rows, or noise on the sums."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from party.bookkeeping import DataSet
from party.federated_bounds import Keeper, Promise, promise_of_sum, refuse_unbounded, sum_preview
from party.opening import Preparation, say
from party.rundir import RunDirectory
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import Vector
from splitfl.config import TuneSettings
from splitfl.rounds.schedule import sums_in

if TYPE_CHECKING:
    from party.federated_private import FederatedPlan


def bound_of(
    settings: TuneSettings, rule: Rule, first: State, run: RunDirectory, train: DataSet, preparation: Preparation,
    name: str,
) -> tuple[TuneSettings, Keeper | None]:  # fmt: skip
    """What holds this party to the bound on its updates, and the settings with the steps that the bound is for.

    The bound, and how much is left to learn from under it, is told before anybody is reached.

    Args:
        settings: of the run.
        rule: of the federation.
        first: the common start.
        run: its directory.
        train: the rows.
        preparation: of a run with DP-SGD; it has the plan.
        name: of the run in the ledger.

    Raises:
        UsageError: the run was begun under another bound, or under none.
    """
    plan = _plan_in(preparation)
    if plan is not None:
        from party.federated_private import promise_of_steps  # needs the extra

        settings = dataclasses.replace(settings, local_steps=plan.local_steps)
        promise = promise_of_steps(plan, train, name)
        _say(settings, rule, first, promise, plan)
        return settings, Keeper(run, promise, resume=settings.resume)
    if settings.sum_noise is not None:
        assert settings.dp_rounds is not None  # noqa: S101  the settings saw to it
        promise = promise_of_sum(settings, sums_in(rule, settings.dp_rounds), train, name)
        _say(settings, rule, first, promise, None)
        return settings, Keeper(run, promise, resume=settings.resume)
    refuse_unbounded(run)
    return settings, None


def _say(settings: TuneSettings, rule: Rule, first: State, promise: Promise, plan: FederatedPlan | None) -> None:
    if settings.sum_noise is not None:
        say(f"bound: {promise.claim}")
        lengths = (rule.length(first, number, step) for number in (0, 1) for step in range(len(rule.steps(number))))
        for line in sum_preview(settings, max(lengths)):
            say(line)
    if plan is not None:
        from party.federated_private import length_preview

        trained = max(first.layout.length(rule.trains(number), extras=True) for number in (0, 1))
        say(length_preview(plan, trained))


def resting(settings: TuneSettings, rule: Rule, state: State, round: int, step: int, length: int) -> Vector | None:
    """What a party would send that had trained nothing, where the change is sent; None where it is taken as it is.

    Under noise on the sum an update is scaled down to a norm, and it is its change that has to be short: the state
    is everybody's, so taking it off and adding it to the mean again tells nothing.
    """
    if settings.sum_noise is None or rule.steps(round)[step].does == "gradient":
        return None
    still = rule.vector(state, rule.start(state, round, step), round, step)
    return np.pad(still, (0, length - still.size))


def _plan_in(preparation: Preparation) -> FederatedPlan | None:
    return getattr(preparation, "private", None)
