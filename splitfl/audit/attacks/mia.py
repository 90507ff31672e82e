"""Was this row among those that the adapter was tuned on? Membership inference from a tuned model's log-probabilities.

Every score is the higher, the likelier the row is a member; the loss of a row is a mean over its counted tokens:

    loss        - loss(tuned)                                                      Yeom and others, 2018
    base        loss(base) - loss(tuned): the kit's base model is public and exact here. The strongest of the cheap ones
                where little was learnt; of rows learnt by heart the loss alone says more
                                                                                   Carlini and others, 2021, section 5.2
    zlib        - sum of losses over the bytes of the compressed text              same
    min-k       mean of the lowest 20 % of the tokens' log-probabilities           Shi and others, 2024
    min-k++     the same of (log p - mean) / deviation over the vocabulary         Zhang and others, 2025
    lira        z-score of logit(p) against models that were trained without the row: offline LiRA,
                one-sided                                                          Carlini and others, 2022, section VI

Members and others must be halves of one corpus, drawn at random (`half_at_random`): sets that differ by source or date
are told apart by their topics, and the attack looks stronger than it is. A model is anything with logits: the whole
model, or a kit's with its trunk behind a link (`party.model.open_model(kit, link)` and `open_adapter` on it), so the
attack is that of whoever gets the adapter and may query the trunk. Legend: N rows, T tokens, V vocabulary, S shadows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from splitfl.audit.intervals import Curve, curve
from splitfl.data import IGNORED, Collator, Example
from splitfl.errors import UsageError

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
LOWEST = 0.2
SHADOWS = 16
_NARROWEST = 1e-3  # of a deviation that is divided by


# ---- what a model says of a row


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStatistics:
    """The counted tokens of one row under one model; all float64 [T]."""

    log_probs: Floats
    """Of the tokens that are there."""
    means: Floats
    """Expected log-probability of a token drawn from the model at that place."""
    deviations: Floats
    """Its standard deviation."""

    @property
    def loss(self) -> float:
        """Mean negative log-probability in nats."""
        return -float(self.log_probs.mean())


@torch.no_grad()
def row_statistics(
    model: nn.Module, examples: Sequence[Example], collator: Collator, *, batch_size: int = 8
) -> list[RowStatistics]:
    """What `model` says of each row, where its loss counts; rows of like length share a batch.

    Args:
        model: causal; it is left in the mode it had. Dropout is off while it is asked.
        examples: N of `splitfl.data.tokenise`.
        collator: pads on the right.
        batch_size: rows of one pass.
    """
    was_training = model.training
    model.eval()
    found: list[RowStatistics | None] = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collator([_without_notes(examples[index]) for index in chosen])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        for index, wanted, said in zip(chosen, labels, logits, strict=True):
            counted = wanted != IGNORED
            found[index] = _statistics(said[counted], wanted[counted])
    model.train(was_training)
    return [each for each in found if each is not None]


def _without_notes(example: Example) -> Example:
    return {name: value for name, value in example.items() if name in ("input_ids", "attention_mask", "labels")}


def _statistics(logits: torch.Tensor, wanted: torch.Tensor) -> RowStatistics:
    logs = torch.log_softmax(logits.double(), dim=-1)
    chances = logs.exp()
    means = (chances * logs).sum(-1)
    spread = ((chances * logs.square()).sum(-1) - means.square()).clamp(min=0).sqrt()
    own = logs.gather(-1, wanted[:, None])[:, 0]
    return RowStatistics(log_probs=own.numpy(), means=means.numpy(), deviations=spread.numpy())


# ---- scores from one model, and from the base beside it


def scores_of(tuned: Sequence[RowStatistics], base: Sequence[RowStatistics], texts: Sequence[str]) -> dict[str, Floats]:
    """Every score that needs no further training, [N] each, by name."""
    losses, before = _losses(tuned), _losses(base)
    bytes_N = np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.float64)
    totals = np.array([-row.log_probs.sum() for row in tuned])
    return {
        "loss": -losses,
        "base": before - losses,
        "zlib": -totals / bytes_N,
        "min-k": np.array([_lowest(row.log_probs) for row in tuned]),
        "min-k++": np.array([_lowest((row.log_probs - row.means) / _divisor(row.deviations)) for row in tuned]),
    }


def _losses(rows: Sequence[RowStatistics]) -> Floats:
    return np.array([row.loss for row in rows])


def _divisor(deviations: Floats) -> Floats:
    return np.maximum(deviations, _NARROWEST)


def _lowest(values: Floats) -> float:
    count = max(1, round(LOWEST * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


# ---- LiRA


def confidence(rows: Sequence[RowStatistics]) -> Floats:
    """logit(p) [N], where p = exp(-loss): the scale on which LiRA's scores are about normal."""
    losses = np.maximum(_losses(rows), 1e-12)
    return np.asarray(-losses - np.log(-np.expm1(-losses)), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shadows:
    """What models that the attacker trained itself say of the rows."""

    confidences: Floats
    """[S, N]"""
    inside: Bools
    """[S, N] which rows each was trained on."""


def train_shadows(
    train: Callable[[Sequence[int]], Sequence[RowStatistics]], rows: int, *, shadows: int = SHADOWS, seed: int = 0
) -> Shadows:
    """Train `shadows` adapters, each on a random half of the rows; each row is left out by half of them.

    Args:
        train: tunes an adapter on the rows of these numbers, as the target was tuned, and returns what the tuned model
            says of all N rows.
        rows: N, members and others alike: the attacker has them all, and does not know which is which.
        shadows: S, even: the second half of them trains on what the first leaves out.
        seed: of the halves.

    Raises:
        UsageError: an odd number of them, or fewer than four.
    """
    if shadows < 4 or shadows % 2:
        raise UsageError(f"{shadows} shadow models cannot be halved.", expected="an even number, 4 or more")
    halves = [half_at_random(rows, seed=seed * 1000 + number) for number in range(shadows // 2)]
    inside = np.stack([*halves, *(~half for half in halves)])
    said = [confidence(train(np.flatnonzero(chosen).tolist())) for chosen in inside]
    return Shadows(confidences=np.stack(said), inside=inside)


def offline_lira(target: Floats, shadows: Shadows, *, fixed_variance: bool = True) -> Floats:
    """How far a row's confidence lies above that of models without it, in deviations: [N].

    The one-sided test of one Gaussian: its p-value is 1 - Phi(score). Models that have the row take no part, in the
    deviation neither. (A published script takes the fixed deviation from the models that *do* have it.)

    Args:
        target: confidences [N] under the model that is attacked.
        shadows: with at least two models without each row.
        fixed_variance: one deviation for all rows, pooled over them: better with few shadows.
    """
    outside = np.where(shadows.inside, np.nan, shadows.confidences)
    means = np.nanmean(outside, axis=0)
    if fixed_variance:
        spare = (~shadows.inside).sum(0) - 1  # degrees of freedom of each row's own mean
        deviation = np.sqrt(np.nansum((outside - means) ** 2) / spare.sum())
    else:
        deviation = np.nanstd(outside, axis=0, ddof=1)
    return np.asarray((target - means) / np.maximum(deviation, _NARROWEST), dtype=np.float64)


# ---- all of it


def half_at_random(count: int, *, seed: int) -> Bools:
    """Which of `count` rows are members: a random half of one corpus, [count]."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(count)[: count // 2]] = True
    return chosen


def membership(
    tuned: Sequence[RowStatistics], base: Sequence[RowStatistics], texts: Sequence[str], member: Bools, *,
    shadows: Shadows | None = None, seed: int = 0,
) -> dict[str, Curve]:  # fmt: skip
    """How well every score tells members from others: AUC, TPR at 1 % and 0.1 % FPR, bootstrap intervals by row.

    Args:
        tuned: what the attacked model says of each row.
        base: the same of the base model, which the owner hands out.
        texts: of the rows.
        member: [N] the truth.
        shadows: for LiRA; it is left out without them.
        seed: of the bootstrap.

    Raises:
        UsageError: rows that do not correspond, or none on one side.
    """
    if len({len(tuned), len(base), len(texts), len(member)}) > 1:
        raise UsageError(
            f"{len(tuned)} rows under the tuned model, {len(base)} under the base, {len(texts)} texts and "
            f"{len(member)} answers do not correspond.",
            expected="the same rows in the same order",
        )
    scores = scores_of(tuned, base, texts)
    if shadows is not None:
        scores["lira"] = offline_lira(confidence(tuned), shadows)
    found: dict[str, Curve] = {}
    for name, score in scores.items():
        drawn = curve(score.tolist(), member.tolist(), list(range(len(member))), seed=seed)
        if drawn is None:
            raise UsageError(
                "Membership was asked of rows that are all members, or none.", expected="a random half of each"
            )
        found[name] = drawn
    return found


def figures(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """One line a score, for tables: name, AUC and true positives at both rates, as text with intervals."""
    return [
        {"score": name, "AUC": str(each.auc), **{f"TPR at {rate:.1%} FPR": str(v) for rate, v in each.tpr.items()}}
        for name, each in curves.items()
    ]
