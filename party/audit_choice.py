"""Which of the rows that crossed are attacked, and which of their sends.

Two choices, since an adapter is known only at some moments (before the first step, at checkpoints, at the end): an
attacker that knows the base model gets rows of the whole run, one that knows the very bottom gets rows that crossed at
such a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from party.recorded import AdapterState, Recorded
from splitfl.audit.scoring import name_of
from splitfl.audit.truth import TrueRow

SENDS_A_ROW = 8
"""Most sends of one row: fresh noise is averaged away over several."""
MOMENTS = 2
"""Most adapters that the attacker with the very bottom is given; each has to be attacked by itself."""
Name: TypeAlias = tuple[str, int]
Part: TypeAlias = tuple[Path | None, tuple[int, ...]]
"""An adapter, None for none, and the numbers that crossed with it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Numbers of the sends to attack."""

    whole: tuple[int, ...]
    """For attackers that know no adapter: rows of the whole run."""
    moments: tuple[Part, ...]
    """For the attacker with the very bottom, by its adapter."""
    nearest: Mapping[int, Path | None]
    """For every number of `whole` the adapter that is nearest in time among those that are known."""
    known: bool
    """Whether any adapter is known: without one there is no twin, and no attacker with the very bottom."""

    @property
    def numbers(self) -> frozenset[int]:
        """All of them."""
        return frozenset(self.whole).union(*(numbers for _, numbers in self.moments))


def choose(recorded: Recorded, records: int, *, several: bool, seed: int) -> Choice:
    """Draw rows and their sends.

    Args:
        recorded: with its truth and states; `sent` is not looked at.
        records: most rows of either choice.
        several: whether all sends of a row are taken (up to `SENDS_A_ROW`), as averaging over noise needs; else the
            last, which is the farthest from the base model.
        seed: of the draw.
    """
    rows = recorded.truth
    by_record = _sends(rows.values())
    # Rows that were trained on are what a run is about; held-out ones fill up.
    names = sorted(_shuffled(sorted(by_record), seed), key=lambda name: name[0] != "train")[:records]
    most = SENDS_A_ROW if several else 1
    whole = tuple(sorted(n for name in names for n in _spread(by_record[name], most)))
    return Choice(
        whole=whole,
        moments=_moments(recorded, records, most, seed),
        nearest=_nearest(recorded.states, whole),
        known=any(state.known for state in recorded.states.values()),
    )


def _sends(rows: Iterable[TrueRow]) -> dict[Name, list[int]]:
    found: dict[Name, list[int]] = {}
    for row in rows:
        found.setdefault(name_of(row), []).append(row.number)
    return {name: sorted(numbers) for name, numbers in found.items()}


def _shuffled(names: Sequence[Name], seed: int) -> list[Name]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [names[at] for at in order]


def _spread(numbers: Sequence[int], most: int) -> Sequence[int]:
    """The last, and where more are wanted others at even distances, the first among them."""
    if len(numbers) <= most:
        return numbers
    if most == 1:
        return numbers[-1:]
    return [numbers[round(at * (len(numbers) - 1) / (most - 1))] for at in range(most)]


def _moments(recorded: Recorded, records: int, most: int, seed: int) -> tuple[Part, ...]:
    parts = []
    for folder, numbers in recorded.by_adapter().items():
        by_record = _sends([recorded.truth[n] for n in numbers if n in recorded.truth])
        if by_record:
            parts.append((len(by_record), numbers[-1], folder, by_record))
    # The adapter that most rows crossed with; among equals the later one, which has learned the most.
    parts.sort(key=lambda part: (part[0], part[1]), reverse=True)
    left, chosen = records, []
    for _, _, folder, by_record in parts[:MOMENTS]:
        names = sorted(_shuffled(sorted(by_record), seed), key=lambda name: name[0] != "train")[: max(left, 0)]
        left -= len(names)
        if names:
            chosen.append((folder, tuple(sorted(n for name in names for n in _spread(by_record[name], most)))))
    return tuple(chosen)


def _nearest(states: Mapping[int, AdapterState], numbers: Sequence[int]) -> dict[int, Path | None]:
    known = {state.weights: state.folder for state in states.values() if state.known}
    found: dict[int, Path | None] = {}
    for number in numbers:
        state = states.get(number)
        if state is not None and state.known:
            found[number] = state.folder
        elif known:
            at = -1 if state is None else state.weights
            found[number] = known[min(known, key=lambda weights: abs(weights - at))]
    return found
