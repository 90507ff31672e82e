"""What the measuring process asks of the two sides that it measures, and what they answer: one JSON line each.

A side is a child process; its standard input and output carry these lines and nothing else.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from splitfl.wire.messages import CodingName


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every line."""


# ---- orders


class Step(Line, frozen=True, kw_only=True, tag="step"):
    """Train one step on the batch of this shape; it is the same batch every time."""

    rows: int
    length: int
    parts: int = 1
    """Micro-batches that overlap; the party's side alone knows how."""
    memory: bool = False
    """Say by how much the step raises the resident memory; takes time that counts."""


class Generate(Line, frozen=True, kw_only=True, tag="generate"):
    """Continue the same random prompt in every row, greedily, to the full length."""

    rows: int
    prompt: int
    new_tokens: int
    logits: str | None = None
    """Write the logits of every new token, [new tokens, rows, vocabulary] float32, to this ``.npy`` file."""


class Peak(Line, frozen=True, kw_only=True, tag="peak"):
    """Say how much memory was held at most."""


Order: TypeAlias = Step | Generate | Peak


# ---- answers


class Ready(Line, frozen=True, kw_only=True):
    """The side has its model and can begin."""

    trainable: int
    """Parameters that are trained."""


class Stepped(Line, frozen=True, kw_only=True):
    """One training step is done; bytes as the session counts them, 0 in the monolith."""

    seconds: float
    loss: float
    sent: int = 0
    received: int = 0
    cpu: float = 0.0
    """Processor seconds of the whole process, encryption included."""
    grown: int | None = None
    """Bytes by which the step raised the resident memory; None where nobody asked or the system does not say."""


class Generated(Line, frozen=True, kw_only=True):
    """One generation is done."""

    seconds: float
    tokens: tuple[tuple[int, ...], ...]
    """The new ones, row by row."""
    sent: int = 0
    received: int = 0


class Held(Line, frozen=True, kw_only=True):
    """Peak of the resident memory since the process began."""

    peak_rss: int


# ---- how a side is started: the first argument of its command line


class MonolithStart(Line, frozen=True, kw_only=True):
    """The whole model in one process."""

    checkpoint: str
    kit: str
    """Its plan says which layers get adapters."""
    dtype: str
    threads: int


class PartyStart(Line, frozen=True, kw_only=True):
    """A data holder's process."""

    kit: str
    owner: str
    owner_key: str
    key: str
    dtype: str
    threads: int
    coding: CodingName = "raw"
    """Of what the party sends, hidden states and gradients."""
