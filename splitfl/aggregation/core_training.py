"""Training cores, and reading gradients, on an unmodified PEFT model: for the rules fed-sb and fedlrt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils import parametrize

from splitfl.aggregation.factors import Pair, Update
from splitfl.errors import ModelError, printable

_PREFIX = "base_model.model."
_ADAPTER = "default"


class _Between(nn.Module):
    """Makes the weight of B out of a core: B core, with B fixed."""

    def __init__(self, b: torch.Tensor, core: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("b", b)
        self.core = core

    def forward(self, core: torch.Tensor) -> torch.Tensor:
        return self.b @ core  # type: ignore[operator]  # a buffer

    def right_inverse(self, _weight: torch.Tensor) -> torch.Tensor:
        return self.core


@contextmanager
def trained_cores(model: nn.Module, update: Update) -> Iterator[Callable[[], Update]]:
    """While it is open, the cores of `update` are what trains in the model's LoRA layers, and A and B are fixed.

    What else requires a gradient, such as a head, goes on doing so. Make the optimiser inside. Afterwards B holds
    B core, so that the model computes the same as before leaving.

    Args:
        model: a PEFT model whose adapter has the ranks and scales of `update` (`peft_format.config_of`).

    Yields:
        What gives the update with the cores as they are now; extras as in `update`.

    Raises:
        ModelError: the adapter does not fit.
    """
    layers = _layers(model, update)
    changed: list[tuple[nn.Linear, bool, torch.Tensor, bool]] = []
    try:
        for name, (down, up) in layers.items():
            pair = update.pairs[name]
            if pair.core is None:
                raise ModelError(f"The update of {printable(name)} has no core to train.")
            a, b = down.weight, up.weight
            changed.append((up, b.requires_grad, a, a.requires_grad))
            with torch.no_grad():
                a.copy_(pair.a)
            a.requires_grad_(False)
            # Copies: training writes into them, and `update` may be every party's.
            between = _Between(pair.b.to(b, copy=True), pair.core.to(b, copy=True))
            parametrize.register_parametrization(up, "weight", between, unsafe=True)
            _original(up).requires_grad_(True)
        yield lambda: update.map(lambda name, pair: _with_core(pair, layers[name][1]))
    finally:
        for linear, b_trained, a, a_trained in changed:
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            linear.weight.requires_grad_(b_trained)
            a.requires_grad_(a_trained)


def gradients(model: nn.Module, update: Update) -> Update:
    """The gradients of A and B in the place of the factors, zero where there is none; at the scale of `update`.

    Args:
        model: as above, after a backward pass whose loss is the mean over the rows.

    Raises:
        ModelError: the adapter does not fit, or another scale is at work in the model.
    """

    def of(weight: torch.Tensor) -> torch.Tensor:
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return grad.detach().to("cpu", torch.float32, copy=True).contiguous()

    layers = _layers(model, update)
    return update.map(lambda name, pair: Pair(of(layers[name][0].weight), of(layers[name][1].weight), pair.scale))


def _layers(model: nn.Module, update: Update) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """The two small modules of each LoRA layer, by the name of the module they belong to."""
    found: dict[str, tuple[nn.Linear, nn.Linear]] = {}
    for full, module in model.named_modules():
        name = full.removeprefix(_PREFIX)
        if isinstance(module, LoraLayer) and name in update.pairs and _ADAPTER in module.lora_A:
            down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
            pair = update.pairs[name]
            fits = down.weight.shape == pair.a.shape and up.weight.shape == pair.b.shape
            if not fits or module.scaling[_ADAPTER] != pair.scale:
                raise ModelError(f"The adapter of {printable(name)} has another rank or scale than the state.")
            found[name] = (down, up)
    if found.keys() != update.pairs.keys():
        missing = min(update.pairs.keys() - found.keys())
        raise ModelError(f"The model has no LoRA layer at {printable(missing)}.")
    return found


def _original(up: nn.Module) -> torch.Tensor:
    return up.parametrizations.weight.original  # type: ignore[union-attr, return-value]  # set by parametrize


def _with_core(pair: Pair, up: nn.Module) -> Pair:
    core = _original(up).detach().to("cpu", torch.float32, copy=True)
    return Pair(pair.a, pair.b, pair.scale, core)
