"""The model of a party in a federation: it takes updates and gives them back, and trains what a rule lets it train."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from splitfl.adapters import add_lora
from splitfl.aggregation.factors import Pair, Part, Update
from splitfl.aggregation.peft_format import adapter_from_update, config_of, filled, update_from_adapter
from splitfl.errors import ModelError, printable

_ADAPTER = "default"
_PREFIX = "base_model.model."


class SharedModel:
    """A PEFT model, and the base weights that changes were merged into.

    Args:
        model: with a fresh adapter, whose modules, rank and head are those of this party.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.config = model.peft_config[_ADAPTER]
        self._own_config = self.config
        self._weights: dict[str, torch.Tensor] = {}
        """Base weights as they came, of the modules that something was merged into."""

    def template(self, rank: int | None = None) -> Update:
        """The adapter as it is; written with a higher rank, and the scale alpha/rank, where one is given."""
        update = self.read()
        if rank is None or update.ranks == {rank}:
            return update
        alpha = self._own_config.lora_alpha
        return update.map(lambda _, pair: Pair(*filled_factors(pair, rank), float(alpha / rank)))

    def read(self) -> Update:
        """The adapter as it is now."""
        return update_from_adapter(get_peft_model_state_dict(self.model), self.config)

    def load(self, update: Update, merged: Mapping[str, Pair]) -> None:
        """Put an update into the model, on top of base weights that `merged` was added to.

        Raises:
            ModelError: modules that this model does not have.
        """
        fitting = config_of(update, self._own_config)
        if (fitting.r, fitting.rank_pattern, fitting.alpha_pattern, fitting.lora_alpha) != (
            self.config.r, self.config.rank_pattern, self.config.alpha_pattern, self.config.lora_alpha,
        ):  # fmt: skip
            base = self.model.unload()
            base.requires_grad_(False)
            self.model, self.config = add_lora(base, fitting), fitting
        self._merge(merged)
        tensors = adapter_from_update(update, self.config)
        missing = get_peft_model_state_dict(self.model).keys() ^ tensors.keys()
        if missing:
            raise ModelError(f"The federation's adapter and this model's differ in {printable(min(missing), 120)}.")
        set_peft_model_state_dict(self.model, tensors)

    def let_train(self, part: Part) -> None:
        """Only this part of each pair gets a gradient, and what is tuned whole."""
        wanted = {"A": ("lora_A",), "B": ("lora_B",), "both": ("lora_A", "lora_B"), "core": ()}[part]
        for name, parameter in self.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.requires_grad_(any(f".{kind}." in name for kind in wanted))

    def _merge(self, merged: Mapping[str, Pair]) -> None:
        """Set the base weights to what they were when they came, plus `merged`."""
        for name in self._weights.keys() | merged.keys():
            weight = self._weight(name)
            if name not in self._weights:
                self._weights[name] = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(self._weights[name])
                if name in merged:
                    b, a = merged[name].wide()
                    change = b @ a
                    change = change.T if self.config.fan_in_fan_out else change
                    weight.copy_((weight.double() + change.to(weight.device)).to(weight.dtype))

    def _weight(self, name: str) -> torch.Tensor:
        """The weight below the LoRA layer of that name."""
        try:
            layer = self.model.get_submodule(_PREFIX + name)
        except AttributeError as error:
            raise ModelError(f"This model has no module {printable(name, 120)}.") from error
        weight = layer.get_submodule("base_layer").weight
        assert isinstance(weight, nn.Parameter)  # noqa: S101  of a linear module
        return weight


def filled_factors(pair: Pair, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of `pair` with zeros up to `rank`."""
    wide = filled(pair, rank)
    return wide.a, wide.b
