"""DP-SGD on the adapter: what whoever gets it can learn about one row (or one person) is bounded.

    each unit joins a step's batch with probability q, independently        Poisson sampling
    g_u   = mean of the gradients of the unit's rows, each row's loss a mean over its own tokens
    g     = (sum_u g_u min(1, C / |g_u|) + N(0, (z C)^2)) / (q N)
    any optimiser steps along g

(Abadi and others, "Deep Learning with Differential Privacy", 2016, algorithm 1.) Gradients by row and their clipping
are Opacus', and so is the accounting (`party.private_plan`). The bound is for the adapter after all steps, and for
neighbours that add or remove one unit; the number of units N, the number of steps, and where a run was stopped and
resumed count as known. Anything else that is made from the rows and given away (losses, checkpoints beside the adapter,
the choice among several adapters) is another release, which this bound does not hold for.

What decides about a unit's gradient is that unit alone: the loss of a row is no mean over its batch, padding is on the
right behind a mask, and no step looks at another row. (Sums of floating-point numbers depend on their order in the last
place; like every implementation of DP-SGD, this one does not account for that.)

Randomness. Opacus' secure mode needs `torchcsprng`, which no longer builds; torch's own generator takes 32 bits of its
seed, few enough to try them all. So sampling and noise come from the operating system's cryptographic generator, anew
for each step: there is no seed, nobody can draw them again, and two runs share nothing. Each noise value is half a sum
of four normals, as in secure mode (Holohan and Braghin, "Secure Random Sampling in Differential Privacy", 2021),
against attacks on the low bits of one draw. Still, this is no exact sampler: values are doubles, rounded to the
gradient's type.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from torch.utils.data import DataLoader

from party.private_plan import PrivatePlan
from party.trainer import SplitTrainer
from splitfl.cut import Task
from splitfl.data import Collator, Example
from splitfl.errors import InternalError, ModelError

_IGNORED = -100
_JOINING = {"opt"}
"""Families whose layers join rows, one after the other, in front of some linear modules: [B, T, D] -> [B T, D]."""


# ---- randomness


def _uniform(count: int) -> npt.NDArray[np.float64]:
    """Multiples of 2^-53 in [0, 1), from the operating system."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return words.astype(np.float64) * 2.0**-53


def gaussian_noise(count: int, sigma: float) -> torch.Tensor:
    """`count` independent normal values with standard deviation `sigma`, float64 [count]; how: see the module."""
    radius = np.sqrt(-2 * np.log(1 - _uniform(2 * count)))  # Box and Muller, 1958: each pair gives two
    angle = 2 * np.pi * _uniform(2 * count)
    four = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, count)
    return torch.from_numpy(four.sum(axis=0) * (sigma / 2))


class PoissonSampler(UniformWithReplacementSampler):  # type: ignore[misc, unused-ignore]
    """Opacus' sampler (despite its name each index comes at most once a batch), with cryptographic randomness."""

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of indices, of any size, empty ones included."""
        for _ in range(self.steps):
            yield np.flatnonzero(_uniform(self.num_samples) < self.sample_rate).tolist()


# ---- the gradient


class _Noised(DPOptimizer):  # type: ignore[misc, unused-ignore]
    """Opacus' clipping and scaling, with our noise. It makes no step: `PrivateGradient` wants the gradient alone."""

    def add_noise(self) -> None:
        for p in self.params:
            if not torch.isfinite(p.summed_grad).all():
                raise ModelError(
                    "A row's gradient is not finite, so it cannot be clipped; nothing of this step is kept.",
                    hint="lower --learning-rate, or use --dtype float32",
                )
            noise = gaussian_noise(p.numel(), self.noise_multiplier * self.max_grad_norm).view(p.shape)
            p.grad = (p.summed_grad.double() + noise.to(p.device)).to(p.dtype)


class PrivateGradient:
    """Clipped, summed and noised gradients of a model's trainable parameters, written into their ``grad``.

    Args:
        model: with an adapter; in training mode when `compute` is called.
        noise_multiplier: standard deviation of the noise over `clip`.
        clip: largest norm of a unit's gradient, over all parameters together.
        expected: units in a step, on average; the sum is divided by it.
        rows_at_once: rows of one pass through the model.
        collator: pads on the right.
        task: of the model.

    Raises:
        ModelError: parameters whose gradients cannot be had row by row.
    """

    def __init__(
        self, model: nn.Module, *, noise_multiplier: float, clip: float, expected: float, rows_at_once: int,
        collator: Collator, task: Task,
    ) -> None:  # fmt: skip
        self.model, self.rows_at_once, self.collator, self.task = model, rows_at_once, collator, task
        self._joins = getattr(getattr(model, "config", None), "model_type", None) in _JOINING
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if any(p.dtype != torch.float32 for p in self.parameters):
            raise ModelError("DP-SGD tunes parameters that are not float32.", hint="add --dtype float32")
        try:
            # Only its hooks are used: they stay on the modules, and the model is called as before.
            self._hooks = GradSampleModule(model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise ModelError(f"Opacus has no gradients by row for this model: {error}") from error
        self._noised = _Noised(
            torch.optim.SGD(self.parameters, lr=1.0),  # only holds the parameters
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=expected,
        )

    def compute(self, units: Sequence[Sequence[Example]]) -> float | None:
        """The gradient of one step, from the rows of each unit in it; the units' mean loss, None without any.

        Raises:
            ModelError: a gradient that is not finite, or that does not come row by row.
        """
        self._check_parameters()
        packs = list(self._packs(units))
        total = 0.0
        for number, pack in enumerate(packs):
            self._noised.zero_grad()
            total += self._gradients_by_unit(pack)
            self._noised.signal_skip_step(number < len(packs) - 1)
            self._noised.pre_step()
        if not packs:  # an empty batch is noise alone, and a step like any other
            self._noised.zero_grad()
            for p in self.parameters:
                p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            self._noised.pre_step()
        for p in self.parameters:
            p.grad_sample = None  # type: ignore[attr-defined]
        return total / len(units) if units else None

    def close(self) -> None:
        """Take the hooks off the model, so that it can be trained again, with other parameters."""
        self._hooks.remove_hooks()

    def _check_parameters(self) -> None:
        """Whatever else were trained would get a gradient without noise."""
        if {id(p) for p in self.model.parameters() if p.requires_grad} != {id(p) for p in self.parameters}:
            raise InternalError("The trainable parameters have changed since DP-SGD was set up.")

    def _packs(self, units: Sequence[Sequence[Example]]) -> Iterator[list[Sequence[Example]]]:
        """Units together, as long as their rows fit into one pass; a unit of more rows is alone."""
        pack: list[Sequence[Example]] = []
        for unit in units:
            if pack and sum(map(len, pack)) + len(unit) > self.rows_at_once:
                yield pack
                pack = []
            pack.append(unit)
        if pack:
            yield pack

    def _gradients_by_unit(self, pack: Sequence[Sequence[Example]]) -> float:
        """Leave a gradient for each unit of the pack in ``grad_sample``; their losses added up."""
        rows = [(number, example) for number, unit in enumerate(pack) for example in unit]
        folded: list[torch.Tensor] = []
        total = 0.0
        for start in range(0, len(rows), self.rows_at_once):
            part = rows[start : start + self.rows_at_once]
            owners = torch.tensor([number for number, _ in part])
            weights = torch.tensor([1 / len(pack[number]) for number, _ in part])
            loss, positions = self._backward([example for _, example in part], weights)
            total += loss
            for index, p in enumerate(self.parameters):
                by_row = self._taken(p, len(part), positions)
                if len(folded) <= index:
                    folded.append(by_row.new_zeros((len(pack), *p.shape)))
                folded[index].index_add_(0, owners.to(p.device), by_row)
        for p, by_unit in zip(self.parameters, folded, strict=True):
            p.grad_sample = by_unit  # type: ignore[attr-defined]
        return total

    def _backward(self, examples: Sequence[Example], weights: torch.Tensor) -> tuple[float, int]:
        """Weighted sum of the losses, and positions of the padded batch."""
        device = self.parameters[0].device
        batch = self.collator([{name: x for name, x in each.items() if name != "row"} for each in examples])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        causal = self.task == "causal-lm"
        logits = self.model(**batch, use_cache=False).logits if causal else self.model(**batch).logits
        loss = (losses_by_row(logits, labels, self.task) * weights.to(device)).sum()
        with warnings.catch_warnings():  # the first layer's input needs no gradient, which a hook remarks upon
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()
        return float(loss.detach()), batch["input_ids"].shape[1]

    def _taken(self, p: nn.Parameter, rows: int, positions: int) -> torch.Tensor:
        by_row = getattr(p, "grad_sample", None)
        if self._joins and isinstance(by_row, torch.Tensor) and by_row.shape == (rows * positions, *p.shape):
            by_row = by_row.view(rows, positions, *p.shape).sum(1)
        if not isinstance(by_row, torch.Tensor) or by_row.shape != (rows, *p.shape):
            raise ModelError(
                "A tuned module of this model does not see its rows one by one, so they cannot be clipped one by one.",
                hint="choose other modules with --target-modules",
            )
        p.grad_sample = None  # type: ignore[attr-defined]
        return by_row


def losses_by_row(logits: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
    """Each row's own loss in nats [B]: a mean over its own tokens, so that no row's depends on another's.

    Args:
        logits: [B, T, V], or [B, classes].
        labels: [B, T], -100 where nothing is learnt; or [B].
        task: which of the two.
    """
    if task == "sequence-classification":
        return nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    target = labels[:, 1:]
    by_token = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), target, ignore_index=_IGNORED, reduction="none"
    )
    return by_token.sum(1) / (target != _IGNORED).sum(1)


# ---- the loop


def grouped(examples: Sequence[Example], units: Sequence[str]) -> list[list[Example]]:
    """The examples of each unit, in the order in which the units first come."""
    found: dict[str, list[Example]] = {}
    for example, unit in zip(examples, units, strict=True):
        found.setdefault(unit, []).append(example)
    return list(found.values())


def freeze_a(model: nn.Module) -> None:
    """Keep the first matrix of each pair as it was drawn, which takes no row: the noise then meets half the values.

    (Sun and others, "Improving LoRA in Privacy-preserving Federated Learning", 2024.)
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_embedding_A." in name:
            parameter.requires_grad_(False)


class PrivateTrainer(SplitTrainer):
    """The training loop with DP-SGD; schedules, optimisers, checkpoints and resuming stay the library's.

    The training arguments must ask for one batch a step and for no other clipping: `training_arguments`.

    Args:
        private: the plan.
        units: for each training example, whose it is.
        rows_at_once: rows of one pass through the model.
    """

    def __init__(
        self, *args: Any, private: PrivatePlan, units: Sequence[str], rows_at_once: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None  # noqa: S101
        assert self.train_dataset is not None  # noqa: S101
        self.private = private
        self.by_unit = grouped(list(self.train_dataset), units)
        self._last_loss = 0.0
        self._gradient = PrivateGradient(
            self.model,
            noise_multiplier=private.noise_multiplier,
            clip=private.clip,
            expected=private.expected,
            rows_at_once=rows_at_once,
            collator=self.collator,
            task=self.plan.task,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's; afterwards the model is free of hooks, and this trainer is used up."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._gradient.close()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Poisson batches of units."""
        sampler = PoissonSampler(
            num_samples=len(self.by_unit),
            sample_rate=self.private.sample_rate,
            steps=math.ceil(1 / self.private.sample_rate),
        )
        units: Any = self.by_unit  # a list is a data set to the loader, if not to its types
        return DataLoader(units, batch_sampler=sampler, collate_fn=_as_they_are)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One whole step's gradient; the loss of an empty batch is told as that of the one before."""
        model.train()
        units = inputs["units"]
        self.tokens_seen += sum(len(example["input_ids"]) for unit in units for example in unit)
        loss = self._gradient.compute(units)
        self._last_loss = self._last_loss if loss is None else loss
        return torch.tensor(self._last_loss, device=self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


def training_arguments(plan: PrivatePlan) -> dict[str, Any]:
    """What a private run asks of `transformers.TrainingArguments`, whatever else was asked for.

    A resumed run draws fresh batches: those of the steps that are lost are never used again.
    """
    return {
        "max_steps": plan.steps,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
        "ignore_data_skip": True,
    }


def _as_they_are(units: list[list[Example]]) -> dict[str, Any]:
    return {"units": units}
