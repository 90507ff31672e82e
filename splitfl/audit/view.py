"""What an attacker is given: the public plan, what crossed, and what it is declared to know. Never the truth.

Legend: T positions of one row, D width of the cut, V size of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from splitfl.kit import Kit

Domain: TypeAlias = Literal["none", "other", "same"]
"""Auxiliary text of the attacker: none, of another domain than the rows, or of the same."""
Effort: TypeAlias = Literal["quick", "default"]


class Knowledge(IntEnum):
    """What an attacker knows of the party's bottom, beside the plan."""

    ARCHITECTURE = 0
    """K0: the configuration alone."""
    BASE = 1
    """K1: the base weights of the kit, which the owner wrote; not the adapter. The realistic case."""
    SEED = 2
    """K2: K1 and the seed from which the adapter was drawn."""
    EXACT = 3
    """K3: the bottom as it is, adapter and all. No attacker has it; the honest worst case."""

    @property
    def short(self) -> str:
        """``K0`` to ``K3``."""
        return f"K{int(self)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sent:
    """One row as it crossed, once. The same row in the next epoch is another one, and nobody says so.

    T counts the positions that the receiver can tell to be tokens: those of the mask, or all where none crossed.
    """

    number: int
    """Its place in the traffic, from 0; what `Guesses` refer to."""
    step: int
    """Number of the request on the wire."""
    place: int
    """Row within its batch."""
    training: bool
    """Whether a backward was announced."""
    hidden: torch.Tensor
    """[T, D] float32, as the receiver computes with it: noise and quantisation included."""
    output: torch.Tensor | None = None
    """[T, D] float32: what the trunk answered."""
    gradient: torch.Tensor | None = None
    """[T, D] float32 at the upper cut, as it crossed."""
    returned: torch.Tensor | None = None
    """[T, D] float32 at the lower cut, as the owner answered."""
    positions: torch.Tensor | None = None
    """[T] int64 as the bottom counted them; None for 0 to T - 1, which they are unless rows are padded on the left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """One update of an adapter as a coordinator or an owner got it in the clear."""

    number: int
    round: int
    before: Mapping[str, torch.Tensor]
    """The state that training began with, which the receiver knows; by name."""
    after: Mapping[str, torch.Tensor]
    learning_rate: float | None = None
    """Where it is public."""
    steps: int | None = None
    """Local steps, where that is public."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is public of the mechanism on activations: Kerckhoffs' principle."""

    name: str = "none"
    sigma: float = 0.0
    """Standard deviation on each coordinate; 0 without Gaussian noise."""
    clip: float = math.inf
    """Largest Frobenius norm of a record (or of a token, where that is the unit)."""
    unit: Literal["record", "token"] = "record"
    """What `clip` holds for: the rows of one `Sent` together, or each of them."""


@dataclass(frozen=True, kw_only=True)
class View:
    """All that an attack is called with."""

    kit: Kit
    """Configuration, tokenizer, base weights of bottom and top: the owner wrote it. K0 reads the configuration only."""
    knowledge: Knowledge
    sent: tuple[Sent, ...] = ()
    updates: tuple[Update, ...] = ()
    noise: Noise = Noise()
    gradient_noise: Noise = Noise()
    adapter: Path | None = None
    """At K3: the adapter that the bottom had when `sent` crossed; None where it had none (an untouched bottom)."""
    lora: Mapping[str, object] | None = None
    """At K2: keyword arguments of `splitfl.adapters.lora_config`, and ``seed``."""
    model: Path | None = None
    """The whole model, where the attacker has it: an owner does."""
    auxiliary: tuple[tuple[int, ...], ...] = ()
    """Token ids of the attacker's own text, one tuple a text."""
    domain: Domain = "none"
    labelled: tuple[tuple[tuple[int, ...], int], ...] = ()
    """Token ids and attribute (0 or more) of texts that the attacker has an attribute of: the author's sex, say."""
    seed: int = 0
    effort: Effort = "default"
    progress: Callable[[float], None] = lambda share: None
    """Called with the share that is done, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What an attack says. Numbers are those of `Sent` or `Update`; what it says nothing about counts as not found."""

    tokens: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Token ids [T] int64 by number, position by position; -1 where it has no guess."""
    answers: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Label of each position [T] int64 by number (before the model's shift); -100 where it says there is none, -1 where
    it says there is one and not which."""
    classes: Mapping[int, int] = field(default_factory=dict)
    """Class of a row, by number."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """The higher, the surer the attack is of what it claims of a row (membership, the positive class)."""
    bags: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Token ids without their places: of an update, or a row."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures about the attack itself: queries, training loss, auxiliary tokens."""
