"""The record of an attack: what it is called, what it needs, and where it stands in the literature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from splitfl.audit.view import Guesses, Knowledge, View

Need: TypeAlias = Literal[
    "hidden", "output", "gradient", "update", "auxiliary", "labelled", "model", "causal", "embedding cut",
    "language model", "classifier",
]  # fmt: skip
Finds: TypeAlias = Literal["tokens", "answers", "classes", "scores", "bags"]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack. `run` reads its `View` and nothing else."""

    name: str
    """As in ``splitfl audit --attack``."""
    title: str
    """One line for people."""
    source: str
    """Paper and section."""
    needs: frozenset[Need]
    """Without one of these it is left out, and the report says so."""
    finds: Finds
    """What its main score is about."""
    least: Knowledge
    """The least knowledge that it works with."""
    run: Callable[[View], Guesses]
    weak_point: str
    """Why it may do badly where the text can be read all the same; the report prints it beside a low score."""
    default: bool = True
    """Whether `splitfl audit` runs it unless told otherwise."""
    taught: bool = False
    """Whether it is taught anew for each bottom, which takes most of its time: one adapter of a run is enough then."""
    rows: int | None = None
    """The most rows, as sent, that it is worth its time on; None for all that the audit takes."""
