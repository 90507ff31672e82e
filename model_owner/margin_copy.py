"""What a holder makes of an emulator by training it on: a copy of the trunk, learnt from rows and from queries.

A query is a row put to the real trunk: it goes through the bottom, the trunk's output comes back, as in a split
session. Here the owner's own model answers (`Pair.full_output`), with the numbers that a session gives. A holder keeps
the answers, so a row is paid for once, however often it is trained on:

    loss = task + 30 KD

with the task's own loss on the holder's rows, and KD as in `model_owner.distil` on the rows that were queried. All
weights of the copy are trained; the kit's layers and the adapter on them stay, so that the answers stay true. The state
that is best on rows kept back is the copy. A holder could do more than this: what is measured is a lower bound.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedModel

from model_owner.distil import Learner
from model_owner.student import KD_WEIGHT, Batch, Figures, Pair, relative_error
from splitfl.cut import Task
from splitfl.data import IGNORED, Collator, Example
from splitfl.errors import ModelError, UsageError

QUERIED = "queried"  # of an example: 1 where the trunk's output is known to the holder


# ---- what a model is worth, row by row


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """The task's loss, and how often the likeliest value is right, on each of N rows; on the CPU."""

    losses: numpy.ndarray[Any, Any]
    """float64 [N]: sums of negative log-likelihoods in nats."""
    counts: numpy.ndarray[Any, Any]
    """int64 [N]: what they are sums over, tokens, or 1 for a classifier."""
    right: numpy.ndarray[Any, Any]
    """int64 [N]: of these, how many were right."""

    @property
    def loss(self) -> float:
        """Mean over all tokens (or rows)."""
        return float(self.losses.sum() / self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share that was right."""
        return float(self.right.sum() / self.counts.sum())


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, task: Task, examples: Sequence[Example], collator: Collator, batch_size: int
) -> RowScores:
    """Score `model` where it is, row by row; rows of like length share a batch."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    losses, counts, right = numpy.zeros(len(order)), numpy.zeros(len(order), int), numpy.zeros(len(order), int)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collator([examples[i] for i in chosen]).items()}
        labels = batch.pop("labels")
        if task == "causal-lm":
            logits, labels = model(**batch, use_cache=False).logits[:, :-1], labels[:, 1:]
        else:
            logits, labels = model(**batch).logits[:, None], labels[:, None]
        counted = labels != IGNORED
        # One value for each label, 0 where there is none.
        each = nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        losses[chosen] = each.double().sum(1).cpu().numpy()
        counts[chosen] = counted.sum(1).cpu().numpy()
        right[chosen] = ((logits.argmax(-1) == labels) & counted).sum(1).cpu().numpy()
    return RowScores(losses=losses, counts=counts, right=right)


@torch.no_grad()
def distance(pair: Pair, examples: Sequence[Example], collator: Collator, batch_size: int) -> float:
    """Mean relative error of the student's output, over all positions."""
    total, positions = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = {
            name: tensor.to(pair.device) for name, tensor in collator(examples[start : start + batch_size]).items()
        }
        del batch["labels"]
        _, output = pair.student_output(batch, None)
        errors = relative_error(output, pair.full_output(batch), batch["attention_mask"])
        total, positions = total + errors.double().sum().item(), positions + errors.numel()
    return total / positions


# ---- the copy


class Copy(Learner):
    """An emulator that its holder trains on."""

    def forward(self, labels: torch.Tensor, queried: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of a batch of B rows: ``loss``, and its parts ``lm`` (the task's) and ``kd``.

        Args:
            labels: [B, T], or [B] for a classifier; all -100 in rows that are for queries alone.
            queried: [B], 1 where the trunk's output may be used.
            batch: what the model takes, each [B, T].
        """
        has_target = bool((labels != IGNORED).any())
        task, output = self.pair.student_output(batch, labels if has_target else None)
        kd = self._distance(batch, output, queried.bool())
        task = output.new_zeros(()) if task is None else task
        return {"loss": task + KD_WEIGHT * kd, "lm": task.detach(), "kd": kd.detach()}

    def _distance(self, batch: Batch, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not bool(rows.any()):
            return output.new_zeros(())
        asked = {name: tensor[rows] for name, tensor in batch.items()}
        return relative_error(output[rows], self.pair.full_output(asked), asked["attention_mask"]).mean()

    def figures(self, examples: Sequence[Example], collator: Collator, batch_size: int) -> Figures:
        """The task's loss alone: looking at the distance here would be a query that nobody counts."""
        with self.pair.with_student() as model:
            scores = score_rows(model, self.pair.plan.task, examples, collator, batch_size)
        return Figures(lm=scores.loss, kd=0.0, positions=int(scores.counts.sum()))


def copies(layers: dict[int, nn.Module]) -> dict[int, nn.Module]:
    """Layers of their own for one more copy."""
    return {index: copy.deepcopy(layer) for index, layer in layers.items()}


def grown(pair: Pair, kept: Sequence[int]) -> dict[int, nn.Module]:
    """The student of `pair` with every place of the trunk filled: a layer left out is a copy of the nearest one kept.

    Raises:
        ModelError: the layers of this model are not all of one shape.
    """
    filled = dict(pair.student)
    for index in set(pair.full) - set(kept):
        nearest = min(kept, key=lambda one: (abs(one - index), one))
        layer = copy.deepcopy(pair.full[index])  # for what its place demands; no weight of it stays
        try:
            layer.load_state_dict(pair.student[nearest].state_dict())
        except RuntimeError as error:
            raise ModelError(
                f"Layer {nearest} of this model does not fit into the place of layer {index}.",
                expected="layers of one shape",
                hint="leave --grow out",
            ) from error
        filled[index] = layer
    return filled


# ---- what is queried


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What the holder has."""

    rows: Sequence[Example]
    """Its own rows, to train on."""
    kept_back: Sequence[Example]
    """Its own rows, to choose the best state with."""
    text: Sequence[Example] = ()
    """What else it may put to the trunk."""

    @property
    def tokens(self) -> int:
        """All that there is to query."""
        return sum(map(_length, (*self.rows, *self.text)))


def choose_queries(holder: Holder, tokens: int, seed: int) -> tuple[list[Example], int]:
    """The examples to train a copy on when up to `tokens` tokens are put to the trunk, and how many these were.

    Whole rows are queried: the holder's own first, then the other text, in an order of `seed` alone, so that more
    queries hold all that fewer hold. Queried rows are repeated until they are half of what is trained on, or more.

    Raises:
        UsageError: not even one row fits.
    """
    draw = numpy.random.default_rng(seed)
    own, other = draw.permutation(len(holder.rows)).tolist(), draw.permutation(len(holder.text)).tolist()
    wanted = [holder.rows[index] for index in own] + [_without_labels(holder.text[index]) for index in other]
    asked, spent = 0, 0
    while asked < len(wanted) and spent + _length(wanted[asked]) <= tokens:
        spent += _length(wanted[asked])
        asked += 1
    if tokens and not asked:
        raise UsageError(
            f"--queries {tokens} is less than one row.", expected=f"{_length(wanted[0])} or more for these rows"
        )
    queried = [{**one, QUERIED: 1} for one in wanted[:asked]]
    rest = [{**one, QUERIED: 0} for one in wanted[asked : len(own)]]
    times = -(-len(rest) // len(queried)) if queried else 0
    return queried * max(times, 1) + rest, spent


def _length(example: Example) -> int:
    return len(example["input_ids"])


def _without_labels(example: Example) -> Example:
    """Text that is not the holder's: its task is not learnt on it."""
    labels = example["labels"]
    return {**example, "labels": IGNORED if isinstance(labels, int) else [IGNORED] * len(labels)}
