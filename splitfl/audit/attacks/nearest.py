"""The nearest token: at the embedding cut an exact search of the vocabulary, deeper a linear discriminant.

With nothing but embeddings below the cut, a position's state depends on its token (and its place) alone, and the least
distance is the likeliest token under Gaussian noise. How often that is right is known beforehand for embeddings of one
norm r that stand at right angles: `splitfl.privacy.calibration.recovery` of r / sigma. Real tables are neither of one
norm nor at right angles; `expected_recovery` says what noise leaves of *them*, and `against_formula` puts the attack's
own figure beside the formula's. Deeper cuts are read position by position by `splitfl.audit.proposals`.

Legend: N draws, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitfl.audit.attack import Attack
from splitfl.audit.bottom import Bottom, open_bottom
from splitfl.audit.linking import Release, releases
from splitfl.audit.proposals import Proposals
from splitfl.audit.view import Guesses, Knowledge, Noise, View
from splitfl.privacy.calibration import recovery

_AT_ONCE = 1 << 24
"""Distances held at a time."""
_Z = 1.96


@dataclass(frozen=True, kw_only=True)
class Level:
    """One noise level: what the attack found and what was to be expected."""

    ratio: float
    """r / sigma, with r the root of the mean squared norm of the table's rows."""
    releases: int
    found: float
    """Share of tokens that the attack named."""
    low: float
    high: float
    """Wilson's interval (1927) of that share, 95 %; draws are independent."""
    formula: float
    """`calibration.recovery`."""

    @property
    def agrees(self) -> bool:
        """Whether the formula lies in the interval."""
        return self.low <= self.formula <= self.high


def nearest_tokens(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Number [N] of the row of `table` [V, D] at the least distance from each of `hidden` [N, D]; float32 throughout.

    All of the vocabulary is looked at, and nothing is rounded before the comparison.
    """
    half = 0.5 * (table * table).sum(1)
    parts = hidden.split(max(1, _AT_ONCE // len(table)))
    return torch.cat([(part @ table.T - half).argmax(dim=1) for part in parts])


def expected_recovery(
    table: torch.Tensor, sigma: float, *, draws: int = 2000, releases: int = 1,
    frequencies: torch.Tensor | None = None, seed: int = 0,
) -> tuple[float, float, float]:  # fmt: skip
    """Share of tokens that the nearest row names after isotropic Gaussian noise, with Wilson's interval (95 %).

    Args:
        table: states of the tokens at the cut, [V, D].
        sigma: of the noise on each coordinate of one release.
        draws: tokens drawn.
        releases: how many fresh draws are averaged.
        frequencies: [V] weights by which tokens are drawn; all alike unless given. The attacker does not use them.
        seed: of tokens and noise.

    Returns:
        Share, lower end, upper end.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(len(table)) if frequencies is None else frequencies.float()
    tokens = torch.multinomial(weights, draws, replacement=True, generator=generator)
    # The mean of n draws is one draw with sigma / sqrt(n): exactly, for a normal distribution.
    noise = torch.randn(draws, table.shape[1], generator=generator) * (sigma / math.sqrt(releases))
    right = int((nearest_tokens(table[tokens] + noise, table) == tokens).sum())
    return right / draws, *_wilson(right, draws)


def against_formula(
    table: torch.Tensor, ratios: Sequence[float] = (2, 3, 4, 5, 6), *, draws: int = 2000, releases: int = 1,
    frequencies: torch.Tensor | None = None, seed: int = 0,
) -> list[Level]:  # fmt: skip
    """The attack's own share beside the formula's, for noise of r / sigma = `ratios`."""
    norm = float((table.double() ** 2).sum(1).mean().sqrt())
    levels = []
    for number, ratio in enumerate(ratios):
        found, low, high = expected_recovery(
            table, norm / ratio, draws=draws, releases=releases, frequencies=frequencies, seed=seed + number
        )
        formula = recovery(ratio, len(table), releases)
        levels.append(Level(ratio=ratio, releases=releases, found=found, low=low, high=high, formula=formula))
    return levels


def _wilson(right: int, draws: int) -> tuple[float, float]:
    share, square = right / draws, _Z**2
    middle = (share + square / (2 * draws)) / (1 + square / draws)
    half = _Z * math.sqrt(share * (1 - share) / draws + square / (4 * draws**2)) / (1 + square / draws)
    return max(0.0, middle - half), min(1.0, middle + half)


# ---- the attack


@torch.no_grad()
def run(view: View) -> Guesses:
    """Token ids of every row; see the module."""
    bottom = open_bottom(view)
    rows = releases(view.sent, view.noise, latest=view.knowledge == Knowledge.EXACT)
    notes = {"rows read": float(len(rows))}
    found: dict[int, torch.Tensor] = {}
    if view.kit.plan.bottom:
        proposals = Proposals(bottom, seed=view.seed)
        for row in rows:
            factor = record_factor(view.noise, len(row.hidden) * proposals.energy)
            ids = proposals.guess(row.hidden / factor, row.variance / factor**2)
            found.update(dict.fromkeys(row.numbers, ids))
        return Guesses(tokens=found, notes=notes | {"tokens put through the bottom": float(proposals.queries)})
    table = embedding_states(bottom, max((len(row.hidden) for row in rows), default=1))
    for row in rows:
        found.update(dict.fromkeys(row.numbers, _read(row, table, view.noise)))
    return Guesses(tokens=found, notes=notes | {"tokens put through the bottom": float(table[..., 0].numel())})


def embedding_states(bottom: Bottom, places: int) -> torch.Tensor:
    """State of each token where nothing lies below the cut but embeddings: [1, V, D], or [places, V, D] if it depends
    on the place.
    """
    count = len(bottom.embeddings)
    every = torch.arange(count)
    probe = bottom(every[:2, None].expand(2, places))
    if places == 1 or torch.equal(probe[:, :1].expand_as(probe), probe):
        return torch.cat([bottom(part[:, None])[:, 0] for part in every.split(4096)])[None]
    rows = max(1, _AT_ONCE // (places * probe.shape[-1]))
    parts = [bottom(part[:, None].expand(-1, places)) for part in every.split(rows)]
    return torch.cat(parts).transpose(0, 1)


def _read(row: Release, table: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Token ids [T]."""
    if noise.unit == "token" and not math.isinf(noise.clip):  # the attacker clips its candidates too
        table = table * (noise.clip / table.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        return _search(row.hidden, table)
    factor = record_factor(noise, len(row.hidden) * float((table**2).sum(-1).mean()))
    ids = _search(row.hidden / factor, table)
    if math.isinf(noise.clip):
        return ids
    for _ in range(2):  # what the record was multiplied with shows once most of it is read
        states = table[torch.arange(len(ids)) if len(table) > 1 else 0, ids]
        factor = float(((states * row.hidden).sum() / (states * states).sum()).clamp(0.25 * factor, 1.0))
        ids = _search(row.hidden / factor, table)
    return ids


def _search(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    if len(table) == 1:
        return nearest_tokens(hidden, table[0])
    return torch.cat([nearest_tokens(each[None], states) for each, states in zip(hidden, table, strict=False)])


def record_factor(noise: Noise, energy: float) -> float:
    """What clipping a record multiplies it with, if its squared norm is `energy`."""
    if noise.unit == "token" or math.isinf(noise.clip):
        return 1.0
    return min(1.0, noise.clip / math.sqrt(energy))


ATTACK = Attack(
    name="nearest",
    title="the nearest token, each position by itself",
    source="Song and Raghunathan, CCS 2020 (arXiv 2004.00053), white box; deeper cuts: a linear discriminant",
    needs=frozenset({"hidden"}),
    finds="tokens",
    least=Knowledge.BASE,
    run=run,
    weak_point="it knows no language and, behind layers that mix positions, treats the context as noise",
)
