"""Local training of a `fedmod` peer, its figures, and its own thresholds.

A step is a function of the seed and its number alone (which rows, which dropout), so a run that goes on from a
checkpoint trains as one that was never broken off.

Legend: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from party.evaluate import Score
from party.fedmod_model import PeerModel
from splitfl.config_mesh import FedmodSettings
from splitfl.data import Collator, Example

_OFFSETS = torch.arange(-20, 21) / 10  # of a class's logit; with two classes, thresholds from 0.12 to 0.88
_SWEEPS = 3
_PRIME = 1_000_003  # keeps the seeds of neighbouring runs apart


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A server's tokenised rows."""

    train: Sequence[Example]
    validation: Sequence[Example]
    held_out: Sequence[Example]
    classes: int


class LocalTrainer:
    """AdamW on LoRA and head, step by step.

    Args:
        peer: the model.
        rows: trained on.
        settings: of the run.
        collator: makes batches.
    """

    def __init__(self, peer: PeerModel, rows: Sequence[Example], settings: FedmodSettings, collator: Collator) -> None:
        self.peer, self._rows, self._settings, self._collator = peer, rows, settings, collator
        self.total = settings.rounds * settings.local_steps
        self.step = 0
        """Steps taken."""
        self.parameters = peer.trainable()
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def run(self, until: int, stopped: Callable[[], bool] = lambda: False) -> float | None:
        """Train up to step `until`, or until somebody asked to stop.

        Returns:
            Mean loss over these steps, in nats; None if there were none.
        """
        losses = []
        self.peer.model.train()
        while self.step < until and not stopped():
            losses.append(self._one())
            self.step += 1
        self.peer.model.eval()
        return sum(losses) / len(losses) if losses else None

    def _one(self) -> float:
        settings = self._settings
        torch.manual_seed(settings.seed * _PRIME + self.step)
        rate = settings.learning_rate * (1 - self.step / self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.peer.model(**self._collator(self._batch(self.step))).loss
        self.optimiser.zero_grad()
        loss.backward()
        self._still(resting(settings, self.step // settings.local_steps))
        if settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        self.optimiser.step()
        return float(loss.detach())

    def _still(self, factor: str | None) -> None:
        """Leave a factor as it is in this step."""
        for name, parameter in self.parameters.items():
            if factor is not None and f".lora_{factor}." in name:
                parameter.grad = None

    def _batch(self, step: int) -> list[Example]:
        size = min(self._settings.per_device_train_batch_size, len(self._rows))
        epoch, place = divmod(step, -(-len(self._rows) // size))
        generator = torch.Generator().manual_seed(self._settings.seed * _PRIME + epoch)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        return [self._rows[index] for index in order[place * size : (place + 1) * size]]


def resting(settings: FedmodSettings, round_number: int) -> str | None:
    """The factor that is not trained in this round: with `rolora` A in even rounds, B in odd ones."""
    if settings.rule == "fedit":
        return None
    return "A" if round_number % 2 == 0 else "B"


# ---- figures


@torch.no_grad()
def logits_of(
    model: nn.Module, examples: Sequence[Example], collator: Collator, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [N, C] and labels int64 [N], in the order of the rows."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    logits: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collator([examples[index] for index in chosen])
        batch.pop("labels")
        for index, row in zip(chosen, model(**batch).logits.float(), strict=True):
            logits[index] = row
    return torch.stack(logits), torch.tensor([int(example["labels"]) for example in examples])


def score(logits: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor | None = None) -> Score:
    """Figures over rows.

    Args:
        logits: [N, C].
        labels: [N].
        offsets: [C], added to the logits before the largest is taken; the loss is without them.
    """
    guess = (logits if offsets is None else logits + offsets).argmax(-1)
    return Score(
        loss=float(nn.functional.cross_entropy(logits, labels)),
        accuracy=float((guess == labels).double().mean()),
        counted=len(labels),
        macro_f1=macro_f1(guess, labels),
    )


def macro_f1(guess: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes that occur, among labels or guesses, of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for one in torch.cat([guess, labels]).unique():
        hit = int(((guess == one) & (labels == one)).sum())
        wrong = int(((guess == one) != (labels == one)).sum())
        scores.append(2 * hit / (2 * hit + wrong))
    return sum(scores) / len(scores)


def choose_offsets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A server's own thresholds: offsets [C] of the logits with the best macro F1 on its validation rows.

    One class after the other, from no offsets, up to three times; of equal figures the smallest offset is taken. With
    two classes an offset d is the threshold 1 / (1 + e^d) on the probability of the second.
    """
    offsets = torch.zeros(logits.shape[1])
    for _ in range(_SWEEPS):
        before = offsets.clone()
        for one in range(1, logits.shape[1]):  # the first stays at 0: only differences count
            tries = sorted(_OFFSETS.tolist(), key=abs)
            found = []
            for value in tries:
                offsets[one] = value
                found.append(macro_f1((logits + offsets).argmax(-1), labels))
            offsets[one] = tries[max(range(len(tries)), key=found.__getitem__)]
        if torch.equal(before, offsets):
            break
    return offsets
