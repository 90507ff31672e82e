"""What a round has brought, on held-out rows: the model that all share, and this party's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from party.evaluate import Score, evaluate
from party.federated_model import SharedModel
from party.protect import numbered
from party.workplace import Workplace
from splitfl.aggregation.factors import Update
from splitfl.aggregation.rule import Rule
from splitfl.aggregation.state import State
from splitfl.config import TuneSettings
from splitfl.kit import Kit

if TYPE_CHECKING:
    from party.tune import Data


class Scores:
    """Scores models of one party; all of its held-out rows count.

    Args:
        rank: this party's own, where it is not the federation's.
    """

    def __init__(
        self, settings: TuneSettings, kit: Kit, data: Data, place: Workplace, rule: Rule, shared: SharedModel,
        rank: int | None,
    ) -> None:  # fmt: skip
        self.settings, self.kit, self.data, self.place = settings, kit, data, place
        self.rule, self.shared, self.rank = rule, shared, rank

    @property
    def rows(self) -> int:
        """Held-out rows behind a score."""
        return 0 if self.data.held_out is None else len(self.data.held_out)

    def of_round(
        self, number: int, round_: int, before: State, after: State, own: Update | None
    ) -> tuple[float | None, float | None]:
        """Score of this party's own model, and of the one that all share; higher is better.

        Args:
            number: of the sum.
            round_: of the rule.
            before: what this party trained from.
            after: what the round made of it.
            own: what this party trained.
        """
        if self.data.held_out is None:
            return None, None
        if self.rule.no_global:
            return higher_is_better(self.of_state(number, round_, after, own, "personal")), None
        personal = None
        if own is not None and self.settings.sum_noise is None:  # no noise is in this party's own model
            self.shared.load(own, before.merged)
            personal = higher_is_better(self._score())
        return personal, higher_is_better(self.of_state(number, round_, after, own, "during"))

    def of_state(self, number: int, round_: int, state: State, own: Update | None, when: str) -> Score | None:
        """Score of the model that a state is, after round `round_`; goes to the log."""
        if self.data.held_out is None:
            return None
        update = self.rule.start(state, round_ + 1, own=own, rank=self.rank)
        if self.rule.steps(round_ + 1)[0].does == "gradient":
            update = state.adapter  # the model itself, and not what its gradient is taken with
        self.shared.load(update, state.merged)
        score = self._score()
        self.place.log.write("eval", step=number + 1, when=when, tokens=score.counted, **score.facts())
        return score

    def _score(self) -> Score:
        assert self.data.held_out is not None  # noqa: S101
        return evaluate(
            self.shared.model,
            numbered(self.data.held_out),
            self.data.collator,
            task=self.kit.plan.task,
            batch_size=self.settings.per_device_eval_batch_size,
            device=self.settings.device,
            on_batch=self.place.tracker.scoring,
        )


def higher_is_better(score: Score | None) -> float | None:
    """Macro F1 of a classifier, else minus the loss: what rounds are judged by."""
    if score is None:
        return None
    return score.macro_f1 if score.macro_f1 is not None else -score.loss
