"""What `splitfl bench rules` asks of its worker (`party/rules_side.py`), and its answers: a JSON line each."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from splitfl.bench.orders import Line
from splitfl.bench.rules_cases import Kind


class PartyFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one party, as JSON Lines."""

    train: str
    validation: str
    held_out: str


class OpenTask(Line, frozen=True, kw_only=True, tag="open"):
    """Load a model and the rows of all parties; runs that follow name the task."""

    task: str
    model: str
    kind: Kind
    classes: int
    tuned_layers: int
    max_length: int
    parties: tuple[PartyFiles, ...]


class RunRule(Line, frozen=True, kw_only=True, tag="run"):
    """Do one run."""

    task: str
    rule: str
    """A rule, or one of `rules_cases.REFERENCES`."""
    ranks: tuple[int, ...]
    """Of each party; empty where all have the federation's."""
    rate: float
    seed: int
    rounds: int
    local_steps: int
    batch: int
    head_rate: float | None = None


RulesOrder: TypeAlias = OpenTask | RunRule


class RulesReady(Line, frozen=True, kw_only=True):
    """The libraries are imported."""

    pid: int


class TaskOpened(Line, frozen=True, kw_only=True):
    """What was loaded."""

    train_rows: tuple[int, ...]
    """Of each party, as are the others."""
    validation_rows: tuple[int, ...]
    held_out_rows: tuple[int, ...]
    tuned_values: int
    """Values of an adapter of the federation's rank, head included."""


class RuleRun(Line, frozen=True, kw_only=True):
    """A run is over."""

    figures: dict[str, float]
    """By metric; the names are those of `splitfl.bench.rules_cases`."""
    failed: str = ""
    """Why it was not done; then there are no figures."""
