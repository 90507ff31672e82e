"""Traffic for tests of attacks, made in this process: a real kit, a real trunk, the party's own code, no socket.

`make` tunes if asked to, then records passes over rows: each is sent through `party.protect.Guard`, with a mechanism or
without, and what the trunk's link receives is what an attacker gets. The truth is kept apart, as in an audit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from model_owner.trunk import LocalLink, Trunk
from party.model import open_model
from party.protect import Guard, Protection
from splitfl.adapters import add_lora, lora_config, save_adapter
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Guesses, Knowledge, Noise, Sent, View
from splitfl.cut import Task
from splitfl.data import Collator, load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import Kit, open_kit, write_kit
from splitfl.link import TrunkRequest, decoded
from splitfl.load import load_trunk_side
from splitfl.privacy.mechanisms import Chain, Gauss, GradientGauss, Mechanism
from tests.families import CAUSAL, VOCAB, save_model

EMBEDDED = assets() / "model"
HOSPITAL = assets() / "data" / "hospital.train.jsonl"
SENTIMENT = assets() / "data" / "sentiment.train.csv"
CLINIC = assets() / "data" / "clinic.train.jsonl"
Example = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What crossed, what the attacker may know, and, apart from it, the truth."""

    kit: Kit
    model: Path
    """The whole model's directory."""
    sent: tuple[Sent, ...]
    truth: tuple[TrueRow, ...]
    """By number, in the order of `sent`."""
    adapter: Path
    """As it was when `sent` crossed (before the first recorded pass, where passes tune)."""
    lora: dict[str, Any]
    noise: Noise
    gradient_noise: Noise

    def view(self, knowledge: Knowledge = Knowledge.EXACT, **more: Any) -> View:
        """What an attacker of that knowledge is called with; `more` are fields of `View`."""
        fixed: dict[str, Any] = {"sent": self.sent, "noise": self.noise, "gradient_noise": self.gradient_noise}
        if knowledge == Knowledge.EXACT:
            fixed["adapter"] = self.adapter
        if knowledge == Knowledge.SEED:
            fixed["lora"] = self.lora
        return View(kit=self.kit, knowledge=knowledge, **{**fixed, **more})

    def share(self, guesses: Guesses) -> float:
        """Tokens that were named rightly over all that are no special ones."""
        right = counted = 0
        for row in self.truth:
            found = guesses.tokens.get(row.number, torch.full_like(row.ids, -1))
            right += int(((found == row.ids) & ~row.special).sum())
            counted += int((~row.special).sum())
        return right / counted

    def shuffled(self, guesses: Guesses) -> float:
        """The same, each guess held against the row after it: what agreement is worth nothing."""
        right = counted = 0
        for row, other in zip(self.truth, [*self.truth[1:], self.truth[0]], strict=True):
            length = min(len(row.ids), len(other.ids))
            found = guesses.tokens.get(row.number, torch.full_like(row.ids, -1))[:length]
            counts = ~other.special[:length]
            right += int(((found == other.ids[:length]) & counts).sum())
            counted += int(counts.sum())
        return right / counted


class Recorder(LocalLink):
    """A link that remembers what crossed, and what the owner answered."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__(trunk)
        self.on = False
        self.seen: list[dict[str, Any]] = []

    def forward(self, request: TrunkRequest) -> tuple[torch.Tensor, int]:
        output, step = super().forward(request)
        if self.on:
            kept = {"step": step, "training": request.keep, "mask": request.mask}
            self.seen.append({**kept, "hidden": decoded(request.hidden).float(), "output": output.float()})
        return output, step

    def backward(self, step: int, gradient: Any) -> torch.Tensor:
        returned = super().backward(step, gradient)
        for each in self.seen:
            if each["step"] == step:
                each.update(gradient=decoded(gradient).float(), returned=returned.float())
        return returned


def make(
    folder: Path, *, model: Path | str = EMBEDDED, bottom: int = 2, top: int = 2, rows: int = 8, batch: int = 4,
    steps: int = 0, epochs: int = 1, tuning: bool = False, training: bool = True, hidden: Mechanism | None = None,
    gradient: Mechanism | None = None, source: Path = HOSPITAL, skip: int = 0, learning_rate: float = 1e-3,
    max_length: int = 192, lora: dict[str, Any] | None = None, examples: Sequence[Example] | None = None,
    task: Task | None = None,
) -> Made:  # fmt: skip
    """Traffic of a party.

    Args:
        folder: for kit, adapter and, where `model` is a name of tests/families.py, the model.
        model: directory of a whole model, or the name of a family: then rows are random ids.
        bottom: layers below the cut.
        top: layers above it.
        rows: how many, from row `skip` of `source` on.
        batch: rows of a batch.
        steps: optimiser steps (AdamW, on these rows, batch by batch) before anything is recorded.
        epochs: recorded passes over the rows.
        tuning: whether the recorded passes take optimiser steps too; then the bottom moves while it is recorded.
        training: whether the recorded passes send gradients; else they are evaluation.
        hidden: mechanism on activations.
        gradient: mechanism on gradients.
        source: a file of rows.
        skip: rows of it to leave out.
        learning_rate: of the optimiser.
        max_length: of an example; longer ones are cut.
        lora: arguments of `lora_config`, and ``seed``; r=8 on all linear modules, seed 0, unless given.
        examples: instead of rows of `source`.
        task: of the kit; by the family unless given.
    """
    encoder = isinstance(model, str) and model not in CAUSAL
    made_up = isinstance(model, str)
    if isinstance(model, str):
        model = save_model(model, folder / "model")
    task = task or ("sequence-classification" if encoder else "causal-lm")
    write_kit(model, folder / "kit", bottom=bottom, top=top, dtype="float32", task=task)
    kit = open_kit(folder / "kit")
    if examples is None:
        examples = random_rows(rows, encoder=encoder) if made_up else rows_of(kit, source, rows, skip, max_length)
    link = Recorder(Trunk(load_trunk_side(model, kit.plan, dtype=torch.float32), kit.plan))
    guard = Guard(link, Protection(hidden=hidden, gradient=gradient), None)
    asked = {"target_modules": ["all-linear"], "seed": 0, **(lora or {})}
    base = open_model(kit, guard)
    told = {name: value for name, value in asked.items() if name != "seed"}
    party = add_lora(base, lora_config(base, kit.plan, **told), seed=asked["seed"])
    batches = _batches(kit, examples, batch)
    _pass(party, [batches[step % len(batches)] for step in range(steps)], learning_rate)
    save_adapter(party, folder / "adapter", base_name="made")
    link.on = True
    for _ in range(epochs):
        _pass(party, batches, learning_rate if tuning else None, backward=training)
    sent, truth = _told(kit, link.seen, batches, len(examples))
    noises = {"noise": _noise(hidden), "gradient_noise": _noise(gradient)}
    return Made(kit=kit, model=model, sent=sent, truth=truth, adapter=folder / "adapter", lora=asked, **noises)


def rows_of(kit: Kit, source: Path, rows: int, skip: int = 0, max_length: int = 192) -> list[Example]:
    """Examples of a file of rows."""
    found = tokenise(load_rows(source, task=kit.plan.task), kit.tokenizer(), max_length=max_length, truncation="right")
    return list(found)[skip : skip + rows]


def random_rows(rows: int, *, encoder: bool = False, length: int = 12, seed: int = 0) -> list[Example]:
    """Examples of random ids for the models of tests/families.py, from `length` / 2 to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Example] = []
    for number in range(rows):
        size = int(torch.randint(length // 2, length + 1, (), generator=generator))
        ids = torch.randint(3, VOCAB, (size,), generator=generator)
        labels = torch.tensor(number % 3) if encoder else ids
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def _batches(kit: Kit, examples: Sequence[Example], size: int) -> list[dict[str, torch.Tensor]]:
    collate = Collator(kit.config, pad_token_id=kit.config.pad_token_id)
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def _pass(
    party: PeftModel, batches: Sequence[dict[str, torch.Tensor]], rate: float | None, *, backward: bool = True
) -> None:
    tuned = [p for p in party.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(tuned, lr=rate or 0.0)
    for batch in batches:
        with torch.set_grad_enabled(backward):
            loss = party(**batch).loss
        if backward:
            optimiser.zero_grad()
            loss.backward()
        if rate is not None:
            optimiser.step()


def _told(
    kit: Kit, seen: Sequence[dict[str, Any]], batches: Sequence[dict[str, torch.Tensor]], rows: int
) -> tuple[tuple[Sent, ...], tuple[TrueRow, ...]]:
    sent: list[Sent] = []
    truth: list[TrueRow] = []
    config = kit.config
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    for index, crossed in enumerate(seen):
        batch = batches[index % len(batches)]
        for place in range(len(batch["input_ids"])):
            number, real = len(sent), batch["attention_mask"][place].bool()
            tensors = {
                name: crossed[name][place][real].clone()
                for name in ("hidden", "output", "gradient", "returned")
                if name in crossed
            }
            sent.append(Sent(number=number, step=crossed["step"], place=place, training=crossed["training"], **tensors))
            ids, labels = batch["input_ids"][place][real], batch["labels"][place]
            truth.append(
                TrueRow(
                    number=number, dataset="train", row=number % rows, ids=ids,
                    labels=labels[real] if labels.ndim else int(labels),
                    special=torch.tensor([int(each) in special for each in ids]),
                )
            )  # fmt: skip
    return tuple(sent), tuple(truth)


def _noise(mechanism: Mechanism | None) -> Noise:
    """What is public of a mechanism."""
    if mechanism is None:
        return Noise()
    last = mechanism.mechanisms[-1] if isinstance(mechanism, Chain) else mechanism
    if isinstance(last, Gauss | GradientGauss):
        unit = "token" if isinstance(last, GradientGauss) else last.unit
        return Noise(name=last.name, sigma=last.sigma, clip=last.clip, unit=unit)
    return Noise(name=mechanism.name)
