"""A run's recording, opened: what crossed as its receiver saw it, the truth behind it, and the adapter it came from.

What an attacker may see (`sent`, `updates`) and what scoring alone may see (`truth`) stay apart here, as on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from party.rundir import RunDirectory
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Noise, Sent, Update
from splitfl.errors import UsageError
from splitfl.kit import Kit


@dataclass(frozen=True, kw_only=True)
class AdapterState:
    """The adapter that a bottom had when a row crossed."""

    weights: int
    """Optimiser steps made before it; -1 where nobody counted them, as in a federation."""
    known: bool
    """Whether this very adapter can be had."""
    folder: Path | None = None
    """Where it is; None for a bottom as the owner wrote it, if `known`."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a recording holds, for the report; messages and bytes without those that were sent again."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    rows: int = 0
    """Rows that crossed: all that `Sent` can be made of."""
    retries: int = 0
    """Messages that crossed once more with the very same bytes."""
    changed_retries: int = 0
    """Those that crossed once more with other bytes, which must not happen: noise was drawn twice."""
    probes: int = 0
    """Forwards of the owner check: made from a row that had crossed, or from random numbers."""
    generations: int = 0
    """Forwards with a KV cache."""
    segments: int = 0
    """Starts of the run that recorded."""
    broken_off: int = 0
    """Segments without an end: the run was killed, or bytes were cut off."""
    full: bool = False
    """Whether the recording stopped at its size limit and the run went on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """All that an audit reads of one run. Numbers are those of `Sent` (or of `Update`)."""

    run: RunDirectory
    sent: tuple[Sent, ...] = ()
    """In the order in which they crossed; only the numbers that were asked for."""
    truth: Mapping[int, TrueRow] = field(default_factory=dict)
    """By number, for every row that crossed and whose origin was noted; scoring and controls alone may read it."""
    updates: tuple[Update, ...] = ()
    noise: Noise = field(default_factory=Noise)
    gradient_noise: Noise = field(default_factory=Noise)
    lora: Mapping[str, object] | None = None
    """For `View.lora` (K2); None where the adapter did not begin as one of that seed."""
    counts: Counts = field(default_factory=Counts)
    states: Mapping[int, AdapterState] = field(default_factory=dict)
    """By number."""

    def adapter_at(self, number: int) -> AdapterState:
        """For `View.adapter` (K3): what the bottom had when row `number` crossed."""
        return self.states.get(number, AdapterState(weights=-1, known=False))

    def by_adapter(self) -> dict[Path | None, tuple[int, ...]]:
        """Numbers whose adapter is known, by its folder; under None those of an untouched bottom."""
        found: dict[Path | None, list[int]] = {}
        for number, state in sorted(self.states.items()):
            if state.known:
                found.setdefault(state.folder, []).append(number)
        return {folder: tuple(numbers) for folder, numbers in found.items()}


def open_recorded(
    run: RunDirectory, kit: Kit, *, key: Path | None = None, owner_recording: Path | None = None,
    owner_key: Path | None = None, numbers: Collection[int] | None = None,
) -> Recorded:  # fmt: skip
    """Open the recording of a run.

    Args:
        run: written by ``splitfl tune --record``; of an offline run the adapter alone is needed.
        kit: the kit that the run was made with.
        key: secret key file of whoever ran it; by default the one that the run remembers.
        owner_recording: a file of ``splitfl serve --record``: what crossed is read from it and not from the run's own
            recording, which still tells the truth behind it.
        owner_key: secret key file of that owner; not needed where it served without keys.
        numbers: make `Sent` of these numbers only; counts, truth and states are always of all. None for all.

    Raises:
        UsageError: the run has no recording, or it was forgotten.
        KeyFileError: the key does not open it.
        DataError: a recording that was altered, or rows that have changed since the run.
    """
    raise UsageError(f"{run.path} holds no recording.", hint="tune with --record")


def forget(run: RunDirectory) -> int:
    """Destroy a run's recording: its key first, then its files. What is missing already is no trouble.

    Returns:
        Bytes that were removed.
    """
    raise UsageError(f"{run.path} holds no recording.")
