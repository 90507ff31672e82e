"""A federation in one process, for `splitfl bench rules`: rounds of real training at each party, and one rule.

There is no network here: rules are functions, and what `splitfl.aggregation.rule` says a party, the sum and the
coordinator do is done in that order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from party.evaluate import Score, evaluate
from party.rules_model import Ground, Party, Tuned
from splitfl.aggregation.core_training import gradients, trained_cores
from splitfl.aggregation.error import aggregation_error
from splitfl.aggregation.factors import Part, Update
from splitfl.aggregation.rule import Rule, mean_vector
from splitfl.aggregation.rules.dynamical import FeDLRT
from splitfl.aggregation.state import State
from splitfl.aggregation.sums import Vector
from splitfl.data import Example

_LARGEST_GRADIENT = 1.0  # norm, as the library's Trainer clips to
_EVAL_BATCH = 32
_FACTOR_OF = {"A": ("lora_A",), "B": ("lora_B",), "both": ("lora_A", "lora_B"), "core": ()}
_CORE_END = ".lora_B.default.parametrizations.weight.original"
_PREFIX = "base_model.model."


@dataclass(kw_only=True)
class Told:
    """What a federation says of itself, by round."""

    errors: list[float | None] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    """Values that each party sent; float32."""
    down: list[int] = field(default_factory=list)
    """Values that each party got."""
    aggregator: list[float] = field(default_factory=list)
    """Processor seconds from the parties' vectors to the next state."""
    validation: list[float] = field(default_factory=list)
    """Nats, after each round."""


class Federation:
    """Parties that train one adapter under a rule.

    Args:
        ground: model and collator.
        tuned: the model, shared by the parties one after the other.
        rule: how updates are combined.
        parties: who takes part; weights are their numbers of training rows.
        ranks: of each; empty where all have the federation's.
        rate: learning rate of the adapter; AdamW without decay, anew in each round.
        head_rate: of a head; that of the adapter, if left out.
        batch: rows of a step.
        seed: of factors and batches.
        judges: whose validation rows a model of all is scored on; those who take part, if left out.
    """

    def __init__(
        self, ground: Ground, tuned: Tuned, rule: Rule, parties: Sequence[Party], *, ranks: Sequence[int] = (),
        rate: float, batch: int, seed: int, judges: Sequence[Party] = (),
        head_rate: float | None = None,
    ) -> None:  # fmt: skip
        self.ground, self.tuned, self.rule, self.parties, self.rate = ground, tuned, rule, parties, rate
        self._part = 1.0
        self._judges, self._head_rate = judges or parties, rate if head_rate is None else head_rate
        self.ranks: list[int | None] = list(ranks) or [None] * len(parties)
        self.weights = [float(len(party.train)) for party in parties]
        self.state = self._trained_from = rule.first(tuned.template, seed)
        self.own: list[Update | None] = [None] * len(parties)
        """What each had after its local steps of the last round."""
        self.told = Told()
        self.passes = 0
        """Batches that one party has sent forward and back."""
        self._batches = [_batches(party.train, batch, party.number, seed) for party in parties]

    def run(self, rounds: int, local_steps: int) -> None:
        """All rounds; the rate falls from round to round, in equal steps, to one step above nothing."""
        for round in range(rounds):
            self._part = 1 - round / rounds
            rows = [[next(batches) for _ in range(local_steps)] for batches in self._batches]
            self._round(round, rows)
            self.told.validation.append(self.validation(round + 1))

    def _round(self, round: int, rows: Sequence[Sequence[list[Example]]]) -> None:
        up = down = 0
        busy = 0.0
        corrections: list[Mapping[str, torch.Tensor] | None] = [None] * len(self.parties)
        for step, what in enumerate(self.rule.steps(round)):
            before = self.state
            sent = [self._start(number, round, step) for number in range(len(self.parties))]
            gradient = what.does == "gradient"
            updates = []
            for number, start in enumerate(sent):
                self.tuned.load(before, start)
                updates.append(
                    self._gradient(start, rows[number]) if gradient
                    else self._train(start, what.trains, rows[number], corrections[number])
                )  # fmt: skip
            self.passes += len(rows[0])
            vectors = [self.rule.vector(before, update, round, step) for update in updates]
            if gradient and isinstance(self.rule, FeDLRT):
                gradients_of = [self.rule.own_gradient(before, vector) for vector in vectors]
            started = time.process_time()
            self.state = self._combined(vectors, round, step)
            busy += time.process_time() - started
            if gradient and isinstance(self.rule, FeDLRT):
                corrections = [self.rule.correction(self.state, own) for own in gradients_of]
            length = self.rule.length(before, round, step)
            up += length
            down += length if self.rule.by_mean(round) else _values(self.state)
            if not gradient:
                self.own, self._trained_from = list(updates), before
                error = aggregation_error(self.rule, before, self.state, updates, self.weights)
                self.told.errors.append(error)
        self.told.up.append(up)
        self.told.down.append(down)
        self.told.aggregator.append(busy)

    def _start(self, number: int, round: int, step: int = 0) -> Update:
        return self.rule.start(self.state, round, step, own=self.own[number], rank=self.ranks[number])

    def _combined(self, vectors: Sequence[Vector], round: int, step: int) -> State:
        if self.rule.by_mean(round):
            return self.rule.from_mean(self.state, mean_vector(vectors, self.weights), round, step)
        updates = [self.rule.update(self.state, vector, round, step) for vector in vectors]
        return self.rule.from_all(self.state, updates, self.weights, round, step)

    # ---- a party

    def _train(
        self, start: Update, part: Part, rows: Sequence[list[Example]], correction: Mapping[str, torch.Tensor] | None
    ) -> Update:
        """Local steps on what the rule trains, and on the head."""
        for name, parameter in self.tuned.model.named_parameters():
            parameter.requires_grad_("modules_to_save" in name or any(f in name for f in _FACTOR_OF[part]))
        if part != "core":
            self._steps(rows, {})
            return self.tuned.update()
        with trained_cores(self.tuned.model, start) as now:
            self._steps(rows, correction or {})
            cores = now()
        return Update(cores.pairs, self.tuned.update().extras)

    def _steps(self, rows: Sequence[list[Example]], correction: Mapping[str, torch.Tensor]) -> None:
        model = self.tuned.model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = [p for name, p in trained.items() if "lora_" not in name]
        rest = [p for name, p in trained.items() if "lora_" in name]
        rates = self.rate * self._part, self._head_rate * self._part
        groups = [{"params": some, "lr": rate} for some, rate in zip((rest, head), rates, strict=True)]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        for batch in rows:
            optimiser.zero_grad(set_to_none=True)
            self.tuned.loss(self.ground.collator, batch).backward()
            for module, more in correction.items():
                grad = trained[f"{_PREFIX}{module}{_CORE_END}"].grad
                assert grad is not None  # noqa: S101
                grad += more
            torch.nn.utils.clip_grad_norm_(trained.values(), _LARGEST_GRADIENT)
            optimiser.step()

    def _gradient(self, start: Update, rows: Sequence[list[Example]]) -> Update:
        """The mean gradient over the batches of this round."""
        for name, parameter in self.tuned.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.tuned.model.zero_grad(set_to_none=True)
        for batch in rows:
            (self.tuned.loss(self.ground.collator, batch) / len(rows)).backward()
        return gradients(self.tuned.model, start)

    # ---- scores

    @property
    def one_model(self) -> bool:
        """Whether there is a model of all."""
        return not self.rule.no_global

    def models(self, round: int) -> Iterator[int]:
        """Load what each party would begin the next round with; one number where it is the same for all."""
        for number in range(1 if self.one_model else len(self.parties)):
            self.tuned.load(self.state, self._shared(number, round))
            yield number

    def _shared(self, number: int, round: int) -> Update:
        """The whole model of all, or a party's own; not cut to a party's rank."""
        if self.one_model:
            return self.state.adapter
        return self.rule.start(self.state, round, own=self.own[number])

    def validation(self, round: int) -> float:
        """Mean over the parties of the loss on their validation rows, each with the model it has."""
        losses: list[float] = []
        for number in self.models(round):
            whose = self._judges if self.one_model else [self.parties[number]]
            losses += [self.score(party.validation).loss for party in whose]
        return sum(losses) / len(losses)

    def after_steps(self, number: int) -> None:
        """Load what a party had after its local steps of the last round, before they were combined."""
        own = self.own[number]
        assert own is not None  # noqa: S101
        self.tuned.load(self._trained_from, own)

    def score(self, examples: Sequence[dict[str, Any]]) -> Score:
        """Of the model as it is loaded."""
        return evaluate(
            self.tuned.model, examples, self.ground.collator, task=self.ground.plan.task, batch_size=_EVAL_BATCH,
            on_batch=self.tuned.remember,
        )  # fmt: skip


def _values(state: State) -> int:
    """Values of a state: the adapter with its head, and all that was merged."""
    pairs = [*state.adapter.pairs.values(), *state.merged.values()]
    factors = sum(pair.a.numel() + pair.b.numel() for pair in pairs)
    return factors + sum(tensor.numel() for tensor in state.adapter.extras.values())


def _batches(rows: Sequence[Example], size: int, number: int, seed: int) -> Iterator[list[Example]]:
    """The rows in a new order each time round; the same for every rule, and for each party by itself."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[index] for index in waiting[:size]]
        del waiting[:size]
