"""The full model and a student that stands in its trunk's places: run both, compare what comes out of the trunk.

The measure is the relative error of offsite-tuning's distillation, ((T - S) / rms(T))^2, and the language-model loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from splitfl.cut import PassThrough, Plan, module_at
from splitfl.data import Collator, Example

KD_WEIGHT = 30.0

Batch: TypeAlias = dict[str, torch.Tensor]


# ---- the full model and a student in one skeleton


class _TrunkDone(Exception):
    """Leaves a forward pass behind the trunk."""


class Pair:
    """The full model, and a student that stands in its trunk's places; bottom and top are shared.

    Args:
        model: with every layer, frozen, in eval mode.
        plan: how it is cut.
        student: for each trunk layer what stands in its place; may be changed between passes.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, student: Mapping[int, nn.Module]) -> None:
        self.model, self.plan = model, plan
        self._layers = module_at(model.base_model, plan.stack)
        self.full: dict[int, nn.Module] = {index: self._layers[index] for index in plan.trunk_layers}
        self.student = dict(student)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextmanager
    def with_student(self) -> Iterator[PreTrainedModel]:
        """The model with the student in its trunk's places."""
        try:
            self._put(self.student)
            yield self.model
        finally:
            self._put(self.full)

    def full_output(self, batch: Batch) -> torch.Tensor:
        """The full trunk's output [B, T, D], without gradient; the top is not run."""
        with torch.no_grad(), self._taken(leave=True) as taken:
            self._run(batch)
        return taken[0]

    def student_output(self, batch: Batch, labels: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The student's language-model loss (mean over labels; None without any), and its output [B, T, D]."""
        with self.with_student(), self._taken(leave=labels is None) as taken:
            loss = self._run(batch, labels=labels)
        return loss, taken[0]

    def _put(self, layers: Mapping[int, nn.Module]) -> None:
        for index, layer in layers.items():
            self._layers[index] = layer

    def _run(self, batch: Batch, **labels: torch.Tensor | None) -> torch.Tensor | None:
        cache = {"use_cache": False} if self.plan.task == "causal-lm" else {}
        try:
            loss: torch.Tensor = self.model(**batch, **labels, **cache).loss
        except _TrunkDone:
            return None
        return loss

    @contextmanager
    def _taken(self, *, leave: bool) -> Iterator[list[torch.Tensor]]:
        """What comes out of the last trunk layer while the block runs; `leave` ends the pass there."""
        taken: list[torch.Tensor] = []

        def take(_layer: nn.Module, _args: Any, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)
            if leave:
                raise _TrunkDone

        hook = self._layers[self.plan.trunk_layers.stop - 1].register_forward_hook(take)
        try:
            yield taken
        finally:
            hook.remove()


def copied(model: PreTrainedModel, plan: Plan, kept: Sequence[int]) -> dict[int, nn.Module]:
    """A student of `model`: copies of the layers `kept`, pass-throughs in the other places of the trunk."""
    layers = module_at(model.base_model, plan.stack)
    return {
        index: copy.deepcopy(layers[index]) if index in kept else left_out(layers[index], index, plan)
        for index in plan.trunk_layers
    }


def left_out(layer: nn.Module, index: int, plan: Plan) -> PassThrough:
    """A pass-through for the place of `layer`, which itself is not touched."""
    return PassThrough(copy.deepcopy(layer), index, plan.returns_tuple)


# ---- the loss, and its measurement


def relative_error(student: torch.Tensor, full: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """((T - S) / rms(T))^2 averaged over the width, for each position that `mask` [B, T] counts.

    Args:
        student: S [B, T, D].
        full: T [B, T, D].
        mask: 1 where there is a token.

    Returns:
        float32 [positions].
    """
    counted = mask.bool()
    wanted, got = full[counted].float(), student[counted].float()
    return (wanted - got).pow(2).mean(-1) / wanted.pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a student is worth on some text."""

    lm: float | None
    """Mean negative log-likelihood a token in nats; None for an encoder."""
    kd: float
    """Mean relative error of the trunk's output."""
    positions: int

    @property
    def loss(self) -> float:
        """What distillation makes small."""
        return (self.lm or 0.0) + KD_WEIGHT * self.kd


@torch.no_grad()
def measure(pair: Pair, examples: Sequence[Example], collator: Collator, *, batch_size: int) -> Figures:
    """The student against the full model; every token has the same weight, whatever row it stands in."""
    lm, kd, targets, positions = 0.0, 0.0, 0, 0
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = collator([examples[index] for index in order[start : start + batch_size]])
        batch = {name: tensor.to(pair.device) for name, tensor in batch.items()}
        labels = batch.pop("labels", None)
        loss, output = pair.student_output(batch, labels)
        errors = relative_error(output, pair.full_output(batch), batch["attention_mask"])
        kd += errors.double().sum().item()
        positions += errors.numel()
        if loss is not None and labels is not None:
            counted = int((labels[:, 1:] != -100).sum())
            lm += loss.item() * counted
            targets += counted
    return Figures(lm=lm / targets if targets else None, kd=kd / positions, positions=positions)
