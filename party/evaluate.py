"""Held-out figures over the same road, without gradient: loss a token, perplexity, accuracy, macro F1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from splitfl.cut import Task
from splitfl.data import Collator

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Score:
    """Figures over a whole set of rows, every counted token (or row, for a classifier) with the same weight."""

    loss: float
    """Mean negative log-likelihood in nats."""
    accuracy: float
    """Share of tokens (or rows) whose most likely value is right."""
    counted: int
    """Tokens, or rows, that the figures are over."""
    perplexity: float | None = None
    """exp(loss); causal models only."""
    macro_f1: float | None = None
    """Mean F1 over classes; classifiers only."""

    def facts(self) -> dict[str, Any]:
        """The figures that there are, as a dictionary."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[dict[str, Any]], collator: Collator, *, task: Task, batch_size: int,
    device: str = "cpu", progress: Callable[[int], None] | None = None,
    on_batch: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Score:  # fmt: skip
    """Score `model` on `examples`; rows of like length share a batch, so little padding is computed.

    Args:
        progress: called with the number of rows done after each batch.
        on_batch: called with each collated batch before it is used; may take fields out of it.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    loss, right, counted = 0.0, 0, 0
    confusion: Counter[tuple[int, int]] = Counter()
    for start in range(0, len(order), batch_size):
        batch = collator([examples[index] for index in order[start : start + batch_size]])
        if on_batch is not None:
            on_batch(batch)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits if task == "causal-lm" else model(**batch).logits
        if task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat, target = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        flat, target = flat[target != _IGNORED], target[target != _IGNORED]
        loss += nn.functional.cross_entropy(flat.float(), target, reduction="sum").item()
        guess = flat.argmax(-1)
        right += int((guess == target).sum())
        counted += target.numel()
        if task == "sequence-classification":
            confusion.update(zip(target.tolist(), guess.tolist(), strict=True))
        if progress is not None:
            progress(min(start + batch_size, len(order)))
    model.train(was_training)
    mean = loss / counted
    if task == "causal-lm":
        return Score(loss=mean, accuracy=right / counted, counted=counted, perplexity=math.exp(min(mean, 700.0)))
    return Score(loss=mean, accuracy=right / counted, counted=counted, macro_f1=_macro_f1(confusion))


def _macro_f1(confusion: Counter[tuple[int, int]]) -> float:
    """Mean over the classes that occur, of 2 TP / (2 TP + FP + FN)."""
    classes = {truth for truth, _ in confusion} | {guess for _, guess in confusion}
    scores = []
    for one in classes:
        hit = confusion[one, one]
        wrong = sum(n for (truth, guess), n in confusion.items() if (truth == one) != (guess == one))
        scores.append(2 * hit / (2 * hit + wrong) if hit or wrong else 0.0)
    return sum(scores) / len(scores)
