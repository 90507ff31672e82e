"""What this party's model says about the public rows, and how it learns from what all models say about them.

A *position* is a token of a public row whose prediction the loss would count, or the row itself for a classifier;
positions are numbered row by row. Labels of public rows are not looked at.

Legend: B rows, T tokens, P positions, V tokens or classes, U entries of a position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from party.trainer import SplitTrainer
from splitfl.aggregation.logits import Ids, Knowledge, LogitLayout, Steps, largest, positions_of
from splitfl.config import TuneSettings
from splitfl.cut import Task
from splitfl.data import IGNORED, Collator, Example, Examples, load_rows, tokenise
from splitfl.errors import DataError, ModelError, UsageError
from splitfl.kit import Kit

if TYPE_CHECKING:
    from party.tune import Data

_OF_A_TOKEN = 32


@dataclass(frozen=True, kw_only=True)
class PublicRows:
    """The rows that all parties have, tokenised."""

    examples: Examples
    task: Task
    classes: int
    """V: tokens of the tokenizer, or classes."""
    starts: tuple[int, ...]
    """Number of the first position of each row, and behind the last row the number of all."""
    digest: str
    """Of everything that must be the same at every party for logits to mean the same."""

    def layout(self, settings: TuneSettings) -> LogitLayout:
        """What is sent of them.

        Raises:
            UsageError: more entries than there are.
        """
        asked = settings.kd_top_k
        if asked is None:
            asked = 0 if self.task == "sequence-classification" else min(_OF_A_TOKEN, self.classes)
        if asked == 1 or asked > self.classes:
            raise UsageError(f"--kd-top-k is {asked}.", expected=f"0, or 2 to {self.classes}")
        return LogitLayout(
            positions=self.starts[-1], classes=self.classes, keep=asked or self.classes,
            temperature=settings.kd_temperature,
        )  # fmt: skip


def read_public(settings: TuneSettings, kit: Kit, options: Mapping[str, Any], private: str) -> PublicRows:
    """The public rows, as this kit's tokenizer reads them.

    Args:
        settings: of the run.
        kit: gives tokenizer and classes.
        options: of `tokenise`, those of the private rows.
        private: fingerprint of the private rows, which must not be the public ones.

    Raises:
        DataError: rows that cannot be read, or the private ones.
    """
    assert settings.public is not None  # noqa: S101  the settings saw to it
    task, tokenizer = kit.plan.task, kit.tokenizer()
    classifies = task == "sequence-classification"
    label2id = dict(kit.config.label2id or {}) if classifies else None
    rows = load_rows(settings.public, columns=settings.column_map(), task=task, label2id=label2id)
    examples = tokenise(rows, tokenizer, **options)
    if examples_digest(examples) == private:
        raise DataError("--public and --train hold the same rows.", hint="public rows are those that everybody has")
    counts = [1 if classifies else sum(label != IGNORED for label in each["labels"][1:]) for each in examples]
    starts = [0, *np.cumsum(counts).tolist()]
    common = {
        "task": task,
        "classes": sorted((label2id or {}).items()),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "rows": [each["input_ids"] for each in examples],
        "positions": None if classifies else [[t != IGNORED for t in each["labels"]] for each in examples],
    }
    told = hashlib.blake2b(json.dumps(common, sort_keys=True).encode(), digest_size=32).hexdigest()
    classes = int(kit.config.num_labels) if classifies else len(tokenizer)
    return PublicRows(examples=examples, task=task, classes=classes, starts=tuple(starts), digest=told)


def examples_digest(examples: Sequence[Example]) -> str:
    """Of the token ids alone."""
    ids = json.dumps([each["input_ids"] for each in examples]).encode()
    return hashlib.blake2b(ids, digest_size=32).hexdigest()


def position_logits(model: nn.Module, batch: dict[str, torch.Tensor], public: PublicRows) -> torch.Tensor:
    """Logits of a batch's positions, [P, V]; takes the labels out of the batch.

    Raises:
        ModelError: the model has fewer outputs than the tokenizer has tokens.
    """
    labels = batch.pop("labels")
    logits: torch.Tensor = model(**batch).logits
    if public.task == "causal-lm":
        logits = logits[:, :-1][labels[:, 1:] != IGNORED]
    if logits.shape[-1] < public.classes:
        raise ModelError(
            f"The model has {logits.shape[-1]} outputs, its tokenizer {public.classes} tokens.",
            expected="a model that can say every token",
        )
    return logits[:, : public.classes].float()  # outputs beyond the tokenizer's are padding, and differ between models


@torch.no_grad()
def said(
    model: nn.Module, public: PublicRows, layout: LogitLayout, collator: Collator, *, batch_size: int, device: str
) -> tuple[Ids, Steps]:
    """The likeliest entries of every position, [P, k], without dropout.

    Raises:
        DataError: the model's answers are not finite; nothing was sent.
    """
    was_training = model.training
    model.eval()
    ids, steps = [], []
    for start in range(0, len(public.examples), batch_size):
        batch = {n: t.to(device) for n, t in collator(public.examples[start : start + batch_size]).items()}
        found = torch.log_softmax(position_logits(model, batch, public) / layout.temperature, dim=-1)
        if not torch.isfinite(found).all():
            raise DataError(
                "The model's answers to public rows are not finite; nothing was sent.",
                hint="training diverged: a lower learning rate, or gradient clipping",
            )
        some_ids, some_steps = largest(found.cpu().numpy(), layout)
        ids.append(some_ids)
        steps.append(some_steps)
    model.train(was_training)
    return np.concatenate(ids), np.concatenate(steps)


class Teacher:
    """The shared knowledge, as targets for rows of the public set.

    Args:
        public: the rows.
        knowledge: about all of their positions.
        temperature: at which it was said.
    """

    def __init__(self, public: PublicRows, knowledge: Knowledge, temperature: float) -> None:
        self.public, self.temperature = public, temperature
        self._ids = torch.from_numpy(np.ascontiguousarray(knowledge.ids, dtype=np.int64))
        self._said = torch.from_numpy(knowledge.log_probabilities.astype(np.float32))
        self._where = list(positions_of(knowledge))

    def loss(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """t^2 KL(q | p), mean over positions; q and p are both over the entries that anybody sent.

        What nobody sent is left as the model has it: nothing is known of it but that it is unlikely. The factor t^2
        keeps gradients of one size whatever the temperature (Hinton, Vinyals and Dean, 1503.02531).

        Args:
            logits: [P, V], of the positions of `rows` in order.
            rows: numbers of the rows of the batch.
        """
        starts = self.public.starts
        where = [self._where[position] for row in rows for position in range(starts[row], starts[row + 1])]
        sequence = nn.utils.rnn.pad_sequence
        ids_PU = sequence([self._ids[each] for each in where], batch_first=True).to(logits.device)
        said_PU = sequence([self._said[each] for each in where], batch_first=True, padding_value=-torch.inf)
        said_PU = said_PU.to(logits.device)
        nobody = torch.isinf(said_PU)
        student = torch.log_softmax(
            (logits.gather(1, ids_PU) / self.temperature).masked_fill(nobody, -torch.inf), dim=1
        )
        teacher = torch.log_softmax(said_PU, dim=1)
        # Minus infinity in both is no difference; its own gradient would be NaN.
        gap = torch.where(nobody, 0.0, teacher - student.masked_fill(nobody, 0.0))
        return self.temperature**2 * (teacher.exp() * gap.masked_fill(nobody, 0.0)).sum(1).mean()


class DistillationTrainer(SplitTrainer):
    """The library's trainer on public rows, with the shared knowledge in the place of labels.

    Args:
        teacher: the knowledge.
        weight: of it; the rest goes on batches of private rows with their own labels.
        private: those rows; looked at only where `weight` is below 1.
        draw: seed of which private rows go with which step.
    """

    def __init__(
        self, *args: Any, teacher: Teacher, weight: float, private: Sequence[Example], draw: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.weight, self.private = teacher, weight, private
        self._generator = torch.Generator().manual_seed(draw)
        self._rows: list[int] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch of public rows, whose numbers are kept."""
        self._rows = inputs["row"].tolist()
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The distance to what all say, and this party's own loss for its share."""
        logits = position_logits(model, dict(inputs), self.teacher.public)
        loss = self.weight * self.teacher.loss(logits, self._rows)
        if self.weight < 1:
            loss = loss + (1 - self.weight) * model(**self._own_batch(logits.device)).loss
        if self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            return loss / self.args.gradient_accumulation_steps  # the library leaves it to the model there
        return loss

    def _own_batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        size = min(self.args.per_device_train_batch_size, len(self.private))
        chosen = torch.randperm(len(self.private), generator=self._generator)[:size].tolist()
        return {name: tensor.to(device) for name, tensor in self.collator([self.private[i] for i in chosen]).items()}


def distillation_data(data: Data, public: PublicRows) -> Data:
    """The run's data with the public rows in the place of the private ones."""
    return replace(data, train=public.examples, held_out=None)
