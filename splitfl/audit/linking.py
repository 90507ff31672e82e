"""Which of the `Sent` are the same row, sent again: each epoch, each evaluation. Nobody tells; an attacker finds out.

Two sends of one row differ by two draws of the noise and by what tuning did to the bottom in between; two rows differ
at every position that does not hold the same token behind the same tokens. Compared are sends of equal length and of
different steps, position by position; the nearest are put together first, and a group never holds two rows of one step.

Legend: T positions of one row, D width of the cut.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitfl.audit.view import Noise, Sent

_DRIFT = 0.25
"""Share that tuning may move between two sends of a row, of a state's squared distance from the mean of all states."""
_SURE = 4.0
"""Standard deviations by which a position may differ."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """One row as the attacker has it after linking."""

    numbers: tuple[int, ...]
    """Of the `Sent` that are held to be this row."""
    hidden: torch.Tensor
    """[T, D]: their mean where noise was fresh, else one of them."""
    variance: float
    """Of the noise left on each coordinate."""


def linked(sent: Sequence[Sent], noise: Noise | None = None) -> tuple[tuple[int, ...], ...]:
    """Groups of the numbers of `sent`, each held to be one row; every number is in exactly one, alone if need be.

    Args:
        noise: what is public of the mechanism; with its `sigma` the expected distance of two sends is known.
    """
    by_length: dict[int, list[Sent]] = defaultdict(list)
    for each in sent:
        by_length[len(each.hidden)].append(each)
    variance = _variance(by_length, noise or Noise())
    mean = torch.cat([each.hidden for each in sent]).mean(0) if sent else torch.zeros(0)
    groups = [group for some in by_length.values() for group in _grouped(some, variance, mean)]
    return tuple(sorted(groups))


def releases(sent: Sequence[Sent], noise: Noise, *, latest: bool = False) -> list[Release]:
    """The rows that `sent` are of, each once.

    Args:
        noise: what is public of the mechanism.
        latest: where nothing was fresh, take the last send of a row rather than the first, from which the base weights
            are least far.
    """
    by_number = {each.number: each for each in sent}
    found = []
    for group in linked(sent, noise):
        states = [by_number[number].hidden for number in group]
        if noise.name in ("none", "quantise", "topk"):
            found.append(Release(numbers=group, hidden=states[-1 if latest else 0], variance=0.0))
            continue
        different = [states[0], *(state for state in states[1:] if not torch.equal(state, states[0]))]
        mean = torch.stack(different).mean(0)
        found.append(Release(numbers=group, hidden=mean, variance=noise.sigma**2 / len(different)))
    return found


def _grouped(some: Sequence[Sent], variance: float, mean: torch.Tensor) -> list[tuple[int, ...]]:
    """Groups within the sends of one length."""
    pairs = sorted(_pairs(some, variance, mean))
    group = {each.number: {each.number} for each in some}
    steps = {each.number: {each.step} for each in some}
    for _, one, other in pairs:
        if group[one] is group[other] or steps[one] & steps[other]:
            continue
        group[one] |= group[other]
        steps[one] |= steps[other]
        for number in group[one]:
            group[number], steps[number] = group[one], steps[one]
    return [tuple(sorted(each)) for each in {id(each): each for each in group.values()}.values()]


def _pairs(some: Sequence[Sent], variance: float, mean: torch.Tensor) -> list[tuple[float, int, int]]:
    """Mean squared distance of each pair that may be one row, and its numbers."""
    found = []
    for index, each in enumerate(some[:-1]):
        rest = [other for other in some[index + 1 :] if other.step != each.step]
        if not rest:
            continue
        others = torch.stack([other.hidden for other in rest])
        width = each.hidden.shape[1]
        away = ((others - each.hidden) ** 2).sum(-1)  # [pairs, T]
        own = ((each.hidden - mean) ** 2).sum(-1) - width * variance
        own = own.clamp_min(0.1 * float(own.clamp_min(0).mean()))
        allowed = 2 * width * variance + 2 * variance * _SURE * math.sqrt(2 * width) + _DRIFT * own
        for other, distance, fits in zip(rest, away.mean(1).tolist(), (away <= allowed).all(1).tolist(), strict=True):
            if fits:
                found.append((distance, each.number, other.number))
    return found


def _variance(by_length: dict[int, list[Sent]], noise: Noise) -> float:
    """Of the mechanism on each coordinate: as it is public, or the least that is seen between two sends."""
    if noise.sigma > 0 or noise.name in ("none", "quantise", "topk"):
        return noise.sigma**2
    least = []
    for some in by_length.values():
        for each in some:
            others = [other.hidden for other in some if other.step != each.step]
            if len(others) < 2:
                continue
            away = ((torch.stack(others) - each.hidden) ** 2).mean(-1).median(dim=1).values
            if away.min() < 0.5 * away.median():  # else the nearest is another row, like the rest
                least.append(float(away.min()) / 2)
    return float(torch.tensor(least).quantile(0.1)) if least else 0.0
