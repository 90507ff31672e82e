"""DP-LoRA as published, to compare with: `--protocol dp-lora --preset paper`. No epsilon is known for it.

For each step at a party (Liu and others, "Differentially Private Low-Rank Adaptation of Large Language Model Using
Federated Learning", 2023, algorithm 1):

    g_A, g_B = mean gradients of one batch, all A of the model as one group, all B as the other
    g       <- g / max(1, |g| / C)                     each group by itself
    g       <- g + N(0, (sigma C)^2 I)                 each value
    A       <- A - rate g_A                            B likewise; plain gradient descent

and the next state is the plain mean of the parties' A and of their B (rule `fedit`). What the paper leaves open
(modules, alpha, sampling, adjacency, delta, accountant) is as the run's other options say, or not known. The noise is
drawn from the operating system's generator. What is logged of gradients is not noised; it is for this party alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from party.trainer import SplitTrainer
from splitfl.config import TuneSettings
from splitfl.errors import ModelError, UsageError
from splitfl.kit import Kit
from splitfl.metrics import RunLog

PARTIES, ROUNDS = 5, 50
"""K and T of the paper; the coordinator's and the federation's business."""
SIGMA, CLIP = 2.0, 10.0
_FIXED: dict[str, Any] = {
    "rule": "fedit",
    "r": 512,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "local_steps": 1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
}
WITHHELD = "epsilon: none; the method as published does not say enough for one, and part of it cannot have one"
WHY_WITHHELD = (
    "the mean gradient of a batch is clipped, not each row's: one row may turn all of it",
    "how batches are drawn, which data sets are neighbours, and delta are not stated; counted one way or the other, "
    "the same sigma is an epsilon of 0.1 or of more than 20",
    "sigma 2 is a noise multiplier and no epsilon of 2",
    "both factors carry noise when their means are multiplied",
)


def with_preset(settings: TuneSettings) -> TuneSettings:
    """The settings with the paper's figures in the place of defaults.

    Raises:
        UsageError: another figure was asked for.
    """
    if settings.preset is None:
        return settings
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, value in _FIXED.items():
        given = getattr(settings, name)
        if given not in (defaults[name], value):
            raise UsageError(
                f"--{name.replace('_', '-')} {given} with --preset {settings.preset}, which has {value}.",
                hint="leave the option out; for another figure use --protocol dp-lora with --dp-noise-multiplier",
            )
    return dataclasses.replace(settings, **_FIXED)


def noise_norm(values: int, sigma: float = SIGMA, clip: float = CLIP) -> float:
    """Expected length of the noise on a group of so many values (exactly: of its square's root)."""
    return sigma * clip * math.sqrt(values)


@dataclass(frozen=True, kw_only=True)
class Literal:
    """Which of the paper's two steps are taken, and how large they are."""

    clip: float | None
    sigma: float | None

    @classmethod
    def of(cls, preset: str) -> Literal:
        """The arm of that name."""
        return cls(
            clip=None if preset == "paper-no-dp" else CLIP, sigma=SIGMA if preset == "paper" else None
        )  # fmt: skip

    def apply(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Clip and noise the gradients in place; lengths by group, which are not noised themselves.

        Raises:
            ModelError: something else than A and B is trained, or a gradient is not finite.
        """
        return {name: self._group(name, parameters) for name, parameters in groups(model).items()}

    def _group(self, name: str, parameters: list[nn.Parameter]) -> dict[str, float]:
        gradients = [p.grad for p in parameters if p.grad is not None]
        raw = _length(gradients)
        if not math.isfinite(raw):
            raise ModelError(f"The gradient of group {name} is not finite.", hint="lower --learning-rate")
        told = {"raw": raw, "values": float(sum(p.numel() for p in parameters))}
        if self.clip is not None:
            for gradient in gradients:
                gradient.div_(max(1.0, raw / self.clip))
            told["clipped"] = _length(gradients)
        if self.sigma is not None and self.clip is not None:
            told["noise"] = self._noise(gradients)
        return told

    def _noise(self, gradients: list[torch.Tensor]) -> float:
        from party.private_sgd import gaussian_noise  # needs the extra

        assert self.sigma is not None  # noqa: S101
        assert self.clip is not None  # noqa: S101
        squares = 0.0
        for gradient in gradients:
            noise = gaussian_noise(gradient.numel(), self.sigma * self.clip).view(gradient.shape)
            squares += float(noise.square().sum())
            gradient.copy_((gradient.double() + noise.to(gradient.device)).to(gradient.dtype))
        return math.sqrt(squares)


def groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained, as the paper's two groups.

    Raises:
        ModelError: something else is trained.
    """
    found: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "A" if ".lora_A." in name else "B" if ".lora_B." in name else None
        if kind is None:
            raise ModelError("The published method has noise for A and B alone, and something else is trained.")
        found[kind].append(parameter)
    return found


class LiteralTrainer(SplitTrainer):
    """The training loop, with the paper's clip and noise before each step of the optimiser.

    Args:
        literal: which of the two.
        log: where lengths of gradients go.
    """

    def __init__(self, *args: Any, literal: Literal, log: RunLog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Apply(literal, log))


class _Apply(TrainerCallback):
    def __init__(self, literal: Literal, log: RunLog) -> None:
        self.literal, self.log = literal, log

    def on_pre_optimizer_step(self, *_args: Any, model: nn.Module | None = None, **_kwargs: Any) -> None:
        """All gradients are there."""
        assert model is not None  # noqa: S101  the library passes it
        for group, lengths in self.literal.apply(model).items():
            self.log.write("diagnostic, not private", group=group, **lengths)


def check_literal(settings: TuneSettings, kit: Kit) -> None:
    """Refuse what the paper has no place for.

    Raises:
        UsageError: a classifier, whose head is tuned whole; biases; DoRA.
    """
    if kit.plan.task != "causal-lm" or settings.use_dora or settings.bias != "none":
        raise UsageError(
            f"--preset {settings.preset} tunes A and B alone, and this run tunes more: a new head, biases or "
            "magnitudes, for which the paper names no noise.",
            hint="a causal model, without --bias and --use-dora; or the method without --preset",
        )


def literal_preview(settings: TuneSettings, values: int) -> list[tuple[str, str]]:
    """What is said before the run: label and text.

    Args:
        settings: with a preset.
        values: in group A, the larger one or not.
    """
    literal = Literal.of(settings.preset or "paper")
    lines = [("as published", f"K={PARTIES} parties, T={ROUNDS} rounds, one step a round, r={settings.r}, plain mean")]
    if literal.sigma is None:
        lines.append(("noise", "none: an arm to compare with" + ("" if literal.clip is None else "; clipped alone")))
        return lines
    ratio = noise_norm(values) / CLIP
    lines.append(("noise", f"length {noise_norm(values):,.0f} on {values:,} values, {ratio:,.0f} times the clip"))
    lines.append(("bound", WITHHELD))
    return lines + [("because", reason) for reason in WHY_WITHHELD]


def _length(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
