"""Which tokens to try first: for each position of a hidden state, all tokens in the order in which they are likely.

The attacker runs the bottom on random token ids and keeps, for each token, the mean of its hidden states, and the
covariance of what the context adds. Both are public, since the bottom is. A position is then judged as by a linear
discriminant (Fisher 1936; Rao 1948): log-likelihood of a normal distribution around the token's mean, with the known
noise in the covariance. No text is learned from. On the embedded model this names more tokens at once than one matrix
from hidden state to embedding does (docs/audit-attacks.md).

Legend: N positions of random rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import torch

from splitfl.audit.bottom import Bottom

_ROW = 64
_BATCH = 16
_FEW, _MANY = 1 << 14, 200_000
"""Tokens put through the bottom: each of the vocabulary at least twice, six times where that is not more than the
second figure, and more often where six times is less than the first."""


class Proposals:
    """A linear discriminant from hidden state to token.

    Args:
        bottom: the bottom as the attacker has it.
        seed: of the random ids.
        places: longest row to make; models with absolute positions allow no more than theirs.
    """

    def __init__(self, bottom: Bottom, *, seed: int = 0, places: int = _ROW) -> None:
        count = len(bottom.embeddings)
        times = max(2, min(6, _MANY // count), _FEW // count)
        sums, scatter, seen = _collect(bottom, times, max(2, min(places, _ROW)), seed)
        self.means = sums / times
        """[V, D]: mean hidden state of each token."""
        # Within the tokens, with the correction for means that were estimated: from each, and of each, 1/times.
        within = (scatter - times * self.means.T.double() @ self.means.double()) / (seen - count) * (1 + 1 / times)
        spread, axes = torch.linalg.eigh(within)
        self._spread = spread.clamp_min(0).float()
        self._axes = axes.float()
        self._inside = self.means @ self._axes
        self.energy = float(scatter.diagonal().sum() / seen)
        """Mean squared norm of a hidden state."""
        self.queries = seen
        """Tokens put through the bottom."""

    def scores(self, hidden: torch.Tensor, variance: float = 0.0) -> torch.Tensor:
        """Log-likelihood [T, V], up to a constant of each position, of `hidden` [T, D].

        Args:
            variance: of what stands between the bottom and `hidden`, on each coordinate.
        """
        floor = 1e-6 * float(self._spread.mean()) + 1e-12
        weights = 1 / (self._spread + max(variance, floor))
        weighted = self._inside * weights
        return (hidden @ self._axes) @ weighted.T - 0.5 * (weighted * self._inside).sum(1)

    def guess(self, hidden: torch.Tensor, variance: float = 0.0) -> torch.Tensor:
        """The likeliest token [T] of each position of `hidden` [T, D]."""
        return self.scores(hidden, variance).argmax(dim=1)


@torch.no_grad()
def _collect(bottom: Bottom, times: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sum of the states of each token [V, D], sum of all outer products float64 [D, D], and how many went in."""
    count = len(bottom.embeddings)
    generator = torch.Generator().manual_seed(seed)
    sums: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    for _ in range(times):
        order = torch.randperm(count, generator=generator)
        rest = -count % length  # the last row is filled up with tokens that are not counted
        filled = torch.cat([order, order[torch.arange(rest) % count]]).view(-1, length)
        states = torch.cat([bottom(part) for part in filled.split(_BATCH)]).flatten(0, 1)[:count]
        if sums is None or scatter is None:
            sums = states.new_zeros(count, states.shape[1])
            scatter = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64)
        sums.index_add_(0, order, states)
        for part in states.split(8192):
            scatter += part.T.double() @ part.double()
    assert sums is not None  # noqa: S101
    assert scatter is not None  # noqa: S101
    return sums, scatter, times * count
