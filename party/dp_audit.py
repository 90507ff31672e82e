"""DP-SGD put to the test: the real training loop with canaries in it, and what an attacker makes of its steps.

    units         the rows, and those of m canaries that a fair coin put in
    PrivateTrainer's own loop: Poisson batches, clipping, noise, the optimiser
    a canary's gradient is one coordinate, ten times as long as the clip; everything else is as for a row
    the attacker sees every step's noisy gradient (or the adapter alone), and each coordinate speaks for one canary

Gradients of one coordinate each are what the accounting is tight for: no row could do worse (Nasr and others,
"Adversary Instantiation: Lower Bounds for Differentially Private Machine Learning", 2021). So half the noise, steps
that are not added up, or a clip that does not clip show as a lower bound above the claim (`splitfl.audit.attacks.
dp_audit`). The canaries count as units of the plan. The run is for the audit: its adapter is of no use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import dp_accounting  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import torch
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray
from torch import nn
from transformers import TrainingArguments

from party.private_plan import PrivatePlan
from party.private_sgd import PrivateGradient, PrivateTrainer, training_arguments
from party.rundir import RunDirectory
from splitfl.audit.attacks.dp_audit import SIGNIFICANCE, Claimed, DpAudit, bound_from_scores, steps_score
from splitfl.cut import Plan
from splitfl.data import Collator, Example
from splitfl.errors import UsageError

LOUD = 10.0
"""Length of a canary's gradient in units of the clip, before clipping."""
_RATE = 1e-3  # the adapter moves little: what is audited is the release, not the learning
_CANARY = "canary"
_AT_ONCE = 256
_POINTS = 60


def claimed_by(plan: PrivatePlan) -> Claimed:
    """What a plan claims: its printed epsilon, and the whole curve of the same event by dp-accounting's PLD."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(plan.sample_rate, dp_accounting.GaussianDpEvent(plan.noise_multiplier))
    accountant.compose(step, plan.steps)
    grid = np.linspace(0.0, max(1.5 * plan.epsilon, 0.5), _POINTS)
    profile = tuple((float(epsilon), float(accountant.get_delta(epsilon))) for epsilon in grid)
    return Claimed(epsilon=plan.epsilon, delta=plan.delta, profile=profile)


class CanaryGradient(PrivateGradient):
    """`PrivateGradient` in which some units are no rows: their gradient is one coordinate of the flat adapter."""

    def plant(self, coordinates: NDArray[np.int64]) -> None:
        """Say which coordinate [m] each canary has, in the order of `parameters`; and begin to watch."""
        self._coordinates = torch.from_numpy(coordinates)
        self.seen: list[torch.Tensor] = []

    def compute(self, units: Sequence[Sequence[Example]]) -> float | None:
        """As before; the noisy gradient at the canaries' coordinates [m] is noted."""
        loss = super().compute(units)
        flat = torch.cat([p.grad.reshape(-1).double() for p in self.parameters if p.grad is not None])
        self.seen.append(flat[self._coordinates])
        return loss

    def _gradients_by_unit(self, pack: Sequence[Sequence[Example]]) -> float:
        rows = [number for number, unit in enumerate(pack) if _CANARY not in unit[0]]
        total = super()._gradients_by_unit([pack[number] for number in rows]) if rows else 0.0
        canaries = [number for number in range(len(pack)) if number not in set(rows)]
        if canaries:
            self._put_in(len(pack), rows, canaries, self._coordinates[[pack[n][0][_CANARY] for n in canaries]])
        return total

    def _put_in(self, count: int, rows: list[int], canaries: list[int], at: torch.Tensor) -> None:
        size = LOUD * self._noised.max_grad_norm
        start, places = 0, torch.tensor(canaries)
        for p in self.parameters:
            flat = p.new_zeros((count, p.numel()))
            if rows:
                flat[rows] = p.grad_sample.reshape(len(rows), -1)  # type: ignore[attr-defined]
            here = (at >= start) & (at < start + p.numel())
            flat[places[here], at[here] - start] = size
            p.grad_sample = flat.view(count, *p.shape)  # type: ignore[attr-defined]
            start += p.numel()


class _AuditedTrainer(PrivateTrainer):
    """The training loop as it is, with canaries among its units."""

    def plant(self, included: NDArray[np.bool_], coordinates: NDArray[np.int64]) -> CanaryGradient:
        old = self._gradient
        old.close()
        gradient = CanaryGradient(
            old.model,
            noise_multiplier=self.private.noise_multiplier,
            clip=self.private.clip,
            expected=self.private.expected,
            rows_at_once=old.rows_at_once,
            collator=old.collator,
            task=old.task,
        )
        gradient.plant(coordinates)
        self.by_unit += [[{"input_ids": [], _CANARY: int(number)}] for number in np.flatnonzero(included)]
        self._gradient = gradient
        return gradient


def audit_dp_sgd(
    model: nn.Module, cut: Plan, rows: Sequence[Example], collator: Collator, plan: PrivatePlan, *, canaries: int,
    claimed: Claimed | None = None, sees: Literal["every step", "adapter"] = "every step", seed: int = 0,
    significance: float = SIGNIFICANCE,
) -> DpAudit:  # fmt: skip
    """Train once with canaries, and bound epsilon from below.

    Args:
        model: with a fresh adapter, float32, as `splitfl tune --protocol dp-lora` has it; it is trained.
        cut: the plan of its kit.
        rows: real examples that are trained on beside the canaries; few are enough.
        collator: of `rows`.
        plan: what is audited; `plan.units` counts rows and canaries.
        canaries: how many; no more than the adapter has values. Fewer than 1000 find only gross mistakes.
        claimed: the upper bound; that of `plan` unless given.
        sees: what the attacker sees. The accounting is for every step; the adapter alone usually says less.
        seed: of the coins and of the choice of coordinates. Noise and batches are never seeded.
        significance: of each bound.

    Raises:
        UsageError: more canaries than the adapter has values, or a plan for another number of units.
    """
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if canaries > values or plan.units != len(rows) + canaries:
        raise UsageError(
            f"{canaries} canaries and {len(rows)} rows in an adapter of {values} values, planned for {plan.units}.",
            expected="a plan whose units are rows and canaries, and a value for each canary",
        )
    draw = np.random.default_rng(seed)
    included, coordinates = draw.random(canaries) < 0.5, draw.choice(values, canaries, replace=False)
    start = _flat(model)[coordinates]
    with _trainer(model, cut, rows, collator, plan) as trainer:
        gradient = trainer.plant(included, coordinates)
        trainer.train()
    if sees == "adapter":
        moved = (start - _flat(model)[coordinates]) / _RATE
        scores = moved.numpy() * plan.expected / plan.clip - plan.sample_rate * plan.steps / 2
    else:
        seen = torch.stack(gradient.seen).numpy() * plan.expected / plan.clip
        scores = steps_score(seen, noise=plan.noise_multiplier, rate=plan.sample_rate)
    return bound_from_scores(scores, included, claimed or claimed_by(plan), significance=significance)


@contextmanager
def _trainer(
    model: nn.Module, cut: Plan, rows: Sequence[Example], collator: Collator, plan: PrivatePlan
) -> Iterator[_AuditedTrainer]:
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", label_names=["labels"],
            remove_unused_columns=False, dataloader_pin_memory=False, logging_strategy="no", optim="sgd",
            learning_rate=_RATE, lr_scheduler_type="constant", **training_arguments(plan),
        )  # fmt: skip
        yield _AuditedTrainer(
            model=model, args=arguments, train_dataset=list(rows), run=RunDirectory(Path(place)), plan=cut,
            collator=collator, held_out=None, private=plan, units=[str(number) for number in range(len(rows))],
            rows_at_once=_AT_ONCE,
        )  # fmt: skip


def _flat(model: nn.Module) -> torch.Tensor:
    """Tuned values end to end, float64, in the order of `PrivateGradient.parameters`."""
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters() if p.requires_grad])
