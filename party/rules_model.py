"""The model that `splitfl bench rules` trains: one base for all parties, and one adapter that is loaded into it.

Layers below the adapters never change, so what comes out of them is computed once for each row and remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from splitfl.adapters import add_lora, lora_config
from splitfl.aggregation.factors import Pair, Update
from splitfl.aggregation.peft_format import adapter_from_update, config_of, update_from_adapter
from splitfl.aggregation.state import State
from splitfl.bench.rules_cases import ALPHA, RANK
from splitfl.bench.rules_orders import OpenTask, PartyFiles
from splitfl.cut import PassThrough, Plan, module_at
from splitfl.data import Collator, Examples, tokenise
from splitfl.kit import load_tokenizer, make_plan
from splitfl.load import load_config, model_class, quiet_library
from splitfl.rows import load_rows

ROW = "row"
"""Field of an example: its number, by which the remembered output is found."""
_AT_ONCE = 32


class Remembered(PassThrough):
    """Stands where the last layer is that nothing tunes, and returns what it once returned for these rows."""

    current: torch.Tensor
    """float32 [B, T, D], set before each pass."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What was set, whatever comes."""
        return self.form(self.current)


class MeanOfTokens(nn.Module):
    """Stands where an encoder has its pooler: what a sentence encoder is trained to be read by."""

    mask: torch.Tensor
    """int64 [B, T], set before each pass."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The mean over the tokens that are not padding, [B, D] from [B, T, D]."""
        counted = self.mask[..., None].to(hidden_states.dtype)
        return (hidden_states * counted).sum(1) / counted.sum(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Party:
    """The rows of one party."""

    number: int
    train: Examples
    validation: Examples
    held_out: Examples


class Ground:
    """One task's model and rows.

    Args:
        order: says where they are.

    Raises:
        SplitflError: a model or rows that cannot be read.
    """

    def __init__(self, order: OpenTask) -> None:
        self.order, self.folder = order, Path(order.model)
        config = load_config(self.folder)
        if order.classes:
            config.num_labels = order.classes
        self.config = config
        self.plan: Plan = make_plan(
            self.folder, bottom=0, top=order.tuned_layers, task=order.kind, dtype="float32", config=config
        )
        tokenizer = load_tokenizer(self.folder)
        self.collator = Collator(tokenizer, pad_token_id=config.pad_token_id)
        self._numbers = 0
        self.parties = [self._party(number, files, tokenizer) for number, files in enumerate(order.parties)]
        self._remembered: list[torch.Tensor] = []

    def _party(self, number: int, files: PartyFiles, tokenizer: Any) -> Party:
        def read(path: str) -> Examples:
            rows = load_rows(Path(path), task=self.order.kind, label2id=self.config.label2id)
            examples = tokenise(rows, tokenizer, max_length=self.order.max_length, truncation="right")
            for example in examples:
                example[ROW], self._numbers = self._numbers, self._numbers + 1
            return examples

        train, validation, held_out = map(read, (files.train, files.validation, files.held_out))
        return Party(number=number, train=train, validation=validation, held_out=held_out)

    @property
    def pooled(self) -> Party:
        """The rows of all parties as those of one."""

        def of(which: str) -> Examples:
            return Examples(example for party in self.parties for example in getattr(party, which))

        return Party(number=len(self.parties), train=of("train"), validation=of("validation"), held_out=of("held_out"))

    def model(self, seed: int) -> Tuned:
        """The model with fresh adapters; a head that the checkpoint lacks is drawn with the seed."""
        torch.manual_seed(seed)
        with quiet_library():
            base: PreTrainedModel = model_class(self.config, self.order.kind).from_pretrained(
                self.folder, config=self.config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        base.requires_grad_(False)
        base.config.use_cache = False
        base.eval()  # no dropout, in training neither: the layers below are computed once
        if hasattr(base.base_model, "pooler"):
            base.base_model.pooler = MeanOfTokens()
        stack, below = module_at(base.base_model, self.plan.stack), self.plan.layers - self.plan.top
        assert isinstance(stack, nn.ModuleList)  # noqa: S101
        if not below:
            return Tuned(base, self.plan, None)
        if not self._remembered:
            self._remembered = self._outputs(base, stack[below - 1])
        for index in range(below - 1):
            stack[index] = PassThrough(stack[index], index, self.plan.returns_tuple)
        last = stack[below - 1] = Remembered(stack[below - 1], below - 1, self.plan.returns_tuple)
        return Tuned(base, self.plan, (last, self._remembered))

    @torch.no_grad()
    def _outputs(self, base: PreTrainedModel, layer: nn.Module) -> list[torch.Tensor]:
        """What `layer` returns for every row: [T, D] each, by the rows' numbers."""
        found: dict[int, torch.Tensor] = {}
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_hook(
            lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        every = [e for p in self.parties for e in (*p.train, *p.validation, *p.held_out)]
        every.sort(key=lambda example: len(example["input_ids"]))
        for start in range(0, len(every), _AT_ONCE):
            some = every[start : start + _AT_ONCE]
            batch = self.collator(some)
            batch.pop(ROW)
            batch.pop("labels")
            if hasattr(base.base_model, "pooler"):
                base.base_model.pooler.mask = batch["attention_mask"]
            base(**batch)
            hidden = seen.pop()
            found |= {e[ROW]: h[: len(e["input_ids"])].clone() for e, h in zip(some, hidden, strict=True)}
        hook.remove()
        return [found[number] for number in range(len(found))]


class Tuned:
    """A base model with an adapter that can be read and set as `Update`, of any rank.

    Args:
        base: frozen; takes the changes that a rule merges.
        plan: which layers get adapters.
        memory: what stands where the lower layers are, and their outputs; None where every layer is tuned.
    """

    def __init__(self, base: PreTrainedModel, plan: Plan, memory: tuple[Remembered, list[torch.Tensor]] | None) -> None:
        self._memory = memory
        self._pooler = getattr(base.base_model, "pooler", None)
        self._config = lora_config(base, plan, r=RANK, lora_alpha=ALPHA, target_modules=["all-linear"])
        self._own = self._config
        self._ranks: dict[str, int] = {}
        self.model: PeftModel = add_lora(base, self._config).eval()
        self.template = self.update()
        self._plain = {name: self._layer(name).weight.detach().clone() for name in self.template.pairs}
        self._merged: object = None

    def update(self) -> Update:
        """The adapter as it is now, head included."""
        return update_from_adapter(get_peft_model_state_dict(self.model), self._own)

    def load(self, state: State, update: Update) -> None:
        """Base weights with what `state` merged, and the adapter `update`; a core is multiplied into B."""
        if self._merged is not state.merged:
            self._merged = state.merged
            for name, plain in self._plain.items():
                change = state.merged.get(name)
                weight = plain if change is None else plain + _product(change)
                self._layer(name).weight.data.copy_(weight)
        ranks = {name: pair.rank for name, pair in update.pairs.items()}
        if ranks != (self._ranks or dict.fromkeys(ranks, RANK)):
            self._own = config_of(update, self._config)
            self.model = add_lora(self.model.unload(), self._own).eval()
        self._ranks = ranks
        set_peft_model_state_dict(self.model, adapter_from_update(update, self._own))

    def remember(self, batch: dict[str, torch.Tensor]) -> None:
        """Take the rows' numbers out of a batch, and have their outputs ready for the next pass."""
        numbers = batch.pop(ROW).tolist()
        if self._pooler is not None:
            self._pooler.mask = batch["attention_mask"]
        if self._memory is None:
            return
        stand_in, outputs = self._memory
        width = batch["input_ids"].shape[1]
        stand_in.current = torch.stack(
            [nn.functional.pad(outputs[n], (0, 0, 0, width - len(outputs[n]))) for n in numbers]
        )

    def loss(self, collator: Collator, examples: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The library's loss of a batch."""
        batch = collator(examples)
        self.remember(batch)
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def _layer(self, name: str) -> nn.Linear:
        layer = self.model.get_base_model().get_submodule(name).base_layer
        assert isinstance(layer, nn.Linear)  # noqa: S101
        return layer


def _product(change: Pair) -> torch.Tensor:
    b, a = change.wide()
    return (b @ a).float()
