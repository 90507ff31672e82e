"""Guesses against the truth: each metric with its interval by record, and what it is beyond guessing blindly.

Special tokens and padding count nowhere. What an attack says nothing about counts as not found. Legend: T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from splitfl.audit.attack import Attack, Finds
from splitfl.audit.baselines import NOTHING, bag_by_frequency, by_frequency, commonest_class, found_at
from splitfl.audit.intervals import Estimate, curve, difference, share
from splitfl.audit.overlap import bag_f1, bleu, rouge_l
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Guesses
from splitfl.audit.words import Marked

ENOUGH = 200
"""Records below which a report says that they are few."""
MAIN: dict[Finds, str] = {
    "tokens": "token recovery",
    "answers": "answer recovery",
    "classes": "class accuracy",
    "scores": "AUC",
    "bags": "bag F1",
}
"""What an attack is ranked by."""
BLIND, BY_MODEL = "beyond frequency", "beyond the model alone"
PLACES = "answer places found"
_IGNORED = -100
Name: TypeAlias = tuple[str, int]
Figures: TypeAlias = dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Everything that scoring knows, worked out once for all attacks."""

    rows: tuple[TrueRow, ...]
    marks: Mapping[Name, Marked] = field(default_factory=dict)
    """By data set and row: words and entities."""
    model: Mapping[int, torch.Tensor] | None = None
    """What the whole model alone would guess, by number; None where it is not there."""
    positive: Mapping[int, bool] = field(default_factory=dict)
    """For attacks that score: whether what they claim of a row is true, by number. Default: it was trained on."""
    classes: Mapping[int, int] = field(default_factory=dict)
    """For attacks on an attribute that is not the label: its value by number."""

    def of(self, numbers: Sequence[int] | frozenset[int]) -> Truth:
        """The same of these numbers alone."""
        kept = set(numbers)
        return Truth(
            rows=tuple(row for row in self.rows if row.number in kept),
            marks=self.marks,
            model=self.model,
            positive=self.positive,
            classes=self.classes,
        )

    @property
    def records(self) -> int:
        """Different rows."""
        return len({name_of(row) for row in self.rows})


def name_of(row: TrueRow) -> Name:
    """The record that a send belongs to: the same one in every epoch."""
    return row.dataset, row.row


def score(guesses: Guesses, truth: Truth, finds: Finds, *, seed: int = 0) -> Figures:
    """Every metric that fits what an attack finds, by name; empty where there is nothing to count.

    Args:
        guesses: of the attack.
        truth: of the rows that it could say something about.
        finds: of the attack.
        seed: of the intervals.
    """
    by_kind: dict[Finds, Callable[[Guesses, Truth, int], Figures]] = {
        "tokens": _tokens,
        "answers": _answers,
        "classes": _classes,
        "scores": _scores,
        "bags": _bags,
    }
    return by_kind[finds](guesses, truth, seed)


def main_name(finds: Finds, figures: Mapping[str, Estimate]) -> str:
    """The name of the figure that an attack is ranked by: where it says that there are answers and never which, that
    of their places."""
    places = finds == "answers" and MAIN[finds] not in figures and PLACES in figures
    return PLACES if places else MAIN[finds]


def main_of(attack: Attack, figures: Figures) -> Estimate | None:
    """The figure that the attack is ranked by."""
    return figures.get(main_name(attack.finds, figures))


class _Sheet:
    """Amounts got and amounts there were, item by item, under the names of metrics."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.got: dict[str, list[float]] = {}
        self.of: dict[str, list[float]] = {}
        self.record: dict[str, list[Name]] = {}

    def add(self, metric: str, got: float, of: float, row: TrueRow) -> None:
        self.got.setdefault(metric, []).append(got)
        self.of.setdefault(metric, []).append(of)
        self.record.setdefault(metric, []).append(name_of(row))

    def figures(self) -> Figures:
        named = {m: share(self.got[m], self.of[m], self.record[m], seed=self.seed) for m in self.got}
        return {metric: figure for metric, figure in named.items() if figure is not None}

    def beyond(self, metric: str, other: Sequence[float]) -> Estimate | None:
        if metric not in self.got:
            return None
        return difference(self.got[metric], other, self.of[metric], self.record[metric], seed=self.seed)


def _with(figures: Figures, **more: Estimate | None) -> Figures:
    names = {"blind": BLIND, "model": BY_MODEL}
    return figures | {names[name]: figure for name, figure in more.items() if figure is not None}


# ---- tokens


def _tokens(guesses: Guesses, truth: Truth, seed: int) -> Figures:
    sheet, blind, model = _Sheet(seed), by_frequency(truth.rows), truth.model
    by_blind: list[float] = []
    by_model: list[float] = []
    for row in truth.rows:
        counts = ~row.special
        if not bool(counts.any()):
            continue
        guess = found_at(guesses.tokens, row, len(row.ids))
        right = (guess == row.ids) & counts
        sheet.add("token recovery", int(right.sum()), int(counts.sum()), row)
        sheet.add("exact sequences", float(bool(right[counts].all())), 1, row)
        said, wanted = [t for t in guess[counts].tolist() if t != NOTHING], row.ids[counts].tolist()
        for name, measure in (("bag F1", bag_f1), ("ROUGE-L", rouge_l), ("BLEU-4", bleu)):
            sheet.add(name, 1.0 if said == wanted else measure(said, wanted), 1, row)
        marked = truth.marks.get(name_of(row))
        if marked is not None:
            for name, places in (("content words", marked.words), ("entities", marked.entities)):
                whole = sum(bool(right[list(one)].all()) for one in places)
                sheet.add(name, whole, len(places), row)
        by_blind.append(_hits(blind[row.number], row, counts))
        if model is not None:
            by_model.append(_hits(model[row.number], row, counts))
    return _with(
        sheet.figures(),
        blind=sheet.beyond("token recovery", by_blind),
        model=sheet.beyond("token recovery", by_model) if model is not None else None,
    )


def _hits(guess: torch.Tensor, row: TrueRow, counts: torch.Tensor) -> float:
    full = found_at({row.number: guess}, row, len(row.ids))
    return float(((full == row.ids) & counts).sum())


# ---- answers: the label of each position


def _answers(guesses: Guesses, truth: Truth, seed: int) -> Figures:
    sheet, blind = _Sheet(seed), by_frequency(truth.rows, "labels")
    by_blind: list[float] = []
    tokens: list[tuple[int, float, TrueRow]] = []
    # An attack that finds where answers stand, and never which they are, is not asked for more.
    names_them = not guesses.answers or any(bool((each >= 0).any()) for each in guesses.answers.values())
    for row in truth.rows:
        if not isinstance(row.labels, torch.Tensor):
            continue
        labels = row.labels.clone()
        labels[:1] = _IGNORED  # the model shifts labels by one place: the first never counts
        counts = labels != _IGNORED
        guess = found_at(guesses.answers, row, len(labels), _IGNORED)
        right = (guess == labels) & counts
        if bool(counts.any()) and names_them:
            sheet.add("answer recovery", int(right.sum()), int(counts.sum()), row)
            sheet.add("exact answers", float(bool(right[counts].all())), 1, row)
            by_blind.append(float(((found_at(blind, row, len(labels)) == labels) & counts).sum()))
            tokens += [(t, float(r), row) for t, r in zip(labels[counts].tolist(), right[counts].tolist(), strict=True)]
        says = guess != _IGNORED
        sheet.add(PLACES, int((says & counts).sum()), int(counts.sum()), row)
        others = ~counts
        others[:1] = False
        sheet.add("other places told apart", int((~says & others).sum()), int(others.sum()), row)
    _evenly(sheet, "answer recovery, mean over tokens", tokens)
    return _with(sheet.figures(), blind=sheet.beyond("answer recovery", by_blind))


def _evenly(sheet: _Sheet, metric: str, items: Sequence[tuple[int, float, TrueRow]]) -> None:
    """Every value weighs the same, however often it occurs."""
    times: dict[int, int] = {}
    for value, _, _ in items:
        times[value] = times.get(value, 0) + 1
    for value, right, row in items:
        sheet.add(metric, right / times[value], 1 / times[value], row)


# ---- classes, scores, bags


def _classes(guesses: Guesses, truth: Truth, seed: int) -> Figures:
    sheet = _Sheet(seed)
    blind = commonest_class(truth.rows)
    by_blind: list[float] = []
    items: list[tuple[int, float, TrueRow]] = []
    for row in truth.rows:
        wanted = truth.classes.get(row.number, row.labels if isinstance(row.labels, int) else None)
        if wanted is None:
            continue
        right = float(guesses.classes.get(row.number) == wanted)
        sheet.add("class accuracy", right, 1, row)
        by_blind.append(float(blind.get(row.number, NOTHING) == wanted))
        items.append((wanted, right, row))
    _evenly(sheet, "class accuracy, mean over classes", items)
    return _with(sheet.figures(), blind=sheet.beyond("class accuracy", by_blind))


def _scores(guesses: Guesses, truth: Truth, seed: int) -> Figures:
    said = [row for row in truth.rows if row.number in guesses.scores]
    values = [guesses.scores[row.number] for row in said]
    member = [truth.positive.get(row.number, row.dataset == "train") for row in said]
    found = curve(values, member, [name_of(row) for row in said], seed=seed) if said else None
    if found is None:
        return {}
    return {"AUC": found.auc} | {f"TPR at {rate:.1%} FPR": each for rate, each in found.tpr.items()}


def _bags(guesses: Guesses, truth: Truth, seed: int) -> Figures:
    sheet = _Sheet(seed)
    by_blind: list[float] = []
    for row in truth.rows:
        wanted = row.ids[~row.special].tolist()
        if not wanted:
            continue
        said = list(guesses.bags.get(row.number, ()))
        sheet.add("bag F1", bag_f1(said, wanted), 1, row)
        sheet.add("tokens in the bag", len(set(said) & set(wanted)), len(set(wanted)), row)
        by_blind.append(bag_f1(bag_by_frequency(truth.rows, len(wanted)), wanted))
    return _with(sheet.figures(), blind=sheet.beyond("bag F1", by_blind))
