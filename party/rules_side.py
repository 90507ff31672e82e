"""The worker of `splitfl bench rules`: ``python -m party.rules_side``. Imports the libraries once, then does runs."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import msgspec
import torch

from party.evaluate import Score
from party.rules_course import Federation
from party.rules_model import Ground
from splitfl.bench.orders import Line
from splitfl.bench.rules_cases import (
    AFTER,
    ALL,
    AT_AGGREGATOR,
    BEFORE,
    DOWN,
    ERROR,
    HEAD,
    KEPT,
    LOCAL,
    OWN,
    PASSES,
    POOLED,
    SAME,
    SECONDS,
    TASKS,
    UP,
    VALIDATION,
    WORST,
    Setting,
    of_round,
    rule_of,
)
from splitfl.bench.rules_orders import OpenTask, RuleRun, RulesOrder, RulesReady, RunRule, TaskOpened
from splitfl.bench.side import own_output
from splitfl.errors import ModelError, printable
from splitfl.quiet import silence_library_warnings


class Worker:
    """Holds the tasks that were opened."""

    def __init__(self) -> None:
        self._grounds: dict[str, Ground] = {}
        self._untuned: dict[tuple[str, int], tuple[float, float]] = {}
        """Held-out score and validation loss of the untuned model, by task and seed: no rule changes it."""

    def answer(self, order: RulesOrder) -> Line:
        """Do what was asked."""
        if isinstance(order, OpenTask):
            return self._open(order)
        try:
            return RuleRun(figures=self._run(order))
        except ModelError as error:  # training at this rate left the numbers that there are
            return RuleRun(figures={}, failed=printable(" ".join(str(error).split())))

    def _open(self, order: OpenTask) -> TaskOpened:
        ground = self._grounds[order.task] = Ground(order)
        template = ground.model(0).template
        values = sum(pair.a.numel() + pair.b.numel() for pair in template.pairs.values())
        return TaskOpened(
            train_rows=tuple(len(party.train) for party in ground.parties),
            validation_rows=tuple(len(party.validation) for party in ground.parties),
            held_out_rows=tuple(len(party.held_out) for party in ground.parties),
            tuned_values=values + sum(tensor.numel() for tensor in template.extras.values()),
        )

    def _run(self, order: RunRule) -> dict[str, float]:
        started = time.monotonic()
        ground = self._grounds[order.task]
        federations = _federations(ground, order)
        key = order.task, order.seed
        if key not in self._untuned:
            self._untuned[key] = _score_untuned(federations[0], ground, order)
        before, loss = self._untuned[key]
        for federation in federations:
            federation.run(order.rounds, order.local_steps)
        figures = {BEFORE: before, **_scores(federations, ground, order), **_validation(federations, loss)}
        if order.rule not in (LOCAL, POOLED, HEAD):
            figures |= _told(federations[0])
        return figures | {SECONDS: time.monotonic() - started}


def _federations(ground: Ground, order: RunRule) -> list[Federation]:
    """One for a rule; for references federations of one party, which combine nothing."""
    parties = ground.parties
    groups = {LOCAL: [[party] for party in parties], POOLED: [[ground.pooled]]}.get(order.rule, [parties])
    batch = order.batch * len(parties) if order.rule == POOLED else order.batch
    tuned = ground.model(order.seed)
    rule = rule_of(Setting(task=order.task, rule=order.rule, ranks=SAME), order.rounds)
    return [
        Federation(
            ground, tuned, rule, group, ranks=order.ranks, rate=order.rate, batch=batch, seed=order.seed,
            judges=parties if order.rule == POOLED else (), head_rate=order.head_rate,
        )
        for group in groups
    ]  # fmt: skip


# ---- figures


def _score_untuned(federation: Federation, ground: Ground, order: RunRule) -> tuple[float, float]:
    federation.tuned.load(federation.state, federation.state.adapter)
    held_out = statistics.fmean(_metric(federation.score(party.held_out), order) for party in ground.parties)
    return held_out, statistics.fmean(federation.score(party.validation).loss for party in ground.parties)


def _scores(federations: Sequence[Federation], ground: Ground, order: RunRule) -> dict[str, float]:
    """Held-out scores: of every model on the rows of all, on its own party's, and before the last combination."""
    table: list[list[float]] = []  # a line for each model, a column for each party's rows
    after: list[float] = []
    for federation in federations:
        for _ in federation.models(order.rounds):
            table.append([_metric(federation.score(party.held_out), order) for party in ground.parties])
        for number, party in enumerate(federation.parties if order.rule not in (LOCAL, POOLED) else ()):
            federation.after_steps(number)
            after.append(_metric(federation.score(party.held_out), order))
    own = table[0] if len(table) == 1 else [line[number] for number, line in enumerate(table)]
    worst = min if TASKS[order.task].higher_is_better else max
    return {
        ALL: statistics.fmean(statistics.fmean(line) for line in table),
        OWN: statistics.fmean(own),
        WORST: worst(own),
        AFTER: statistics.fmean(after or own),  # nothing is combined in a reference
    }


def _metric(score: Score, order: RunRule) -> float:
    return score.accuracy if TASKS[order.task].metric == "accuracy" else score.loss


def _validation(federations: Sequence[Federation], untuned: float) -> dict[str, float]:
    """Validation loss by round, mean over the federations, and how much of the best round's gain the last one kept."""
    losses = [untuned] + [statistics.fmean(of) for of in zip(*(f.told.validation for f in federations), strict=True)]
    gained = losses[0] - min(losses)
    figures = {of_round(VALIDATION, number): loss for number, loss in enumerate(losses)}
    return {**figures, VALIDATION: losses[-1], KEPT: (losses[0] - losses[-1]) / gained if gained > 0 else 0.0}


def _told(federation: Federation) -> dict[str, float]:
    """What only a rule has: errors by round, values that crossed, time where they are combined."""
    told = federation.told
    figures: dict[str, float] = {
        UP: statistics.fmean(told.up),
        DOWN: statistics.fmean(told.down),
        AT_AGGREGATOR: statistics.median(told.aggregator),
        PASSES: float(federation.passes),
    }
    errors = [error for error in told.errors if error is not None]
    if errors:
        figures[ERROR] = statistics.fmean(errors)
        figures |= {of_round(ERROR, number): error for number, error in enumerate(errors, start=1)}
    return figures


# ---- orders


def _say(answers: TextIO, line: Line) -> None:
    answers.write(msgspec.json.encode(line).decode() + "\n")
    answers.flush()


def main() -> None:
    """Run until standard input ends, which it also does when the measuring process is gone."""
    silence_library_warnings()
    torch.set_num_threads(1)
    answers = own_output()
    _say(answers, RulesReady(pid=os.getpid()))
    worker, decoder = Worker(), msgspec.json.Decoder(RulesOrder)
    for line in sys.stdin:
        _say(answers, worker.answer(decoder.decode(line)))


if __name__ == "__main__":
    main()
