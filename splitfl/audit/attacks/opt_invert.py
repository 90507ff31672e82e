"""Inversion by optimisation: inputs whose hidden state points where the one that crossed points.

From a first guess, `refine` moves embeddings freely to minimise the mean of 1 - cos(f(e), h) over positions (BiSR,
arXiv 2409.00960, forward stage; AdamW, 600 steps), then relaxes each position to a mixture of tokens, softmax(z / T) E
with T falling from 0.2 to 0.05 (Song and Raghunathan, CCS 2020, arXiv 2004.00053), and reads tokens off. Last it swaps
single tokens for those that gradient or discriminant likes (the gradient's choice: HotFlip, arXiv 1712.06751). Every
read-out is put through the bottom again, and the best of a row is kept, the first guess included: the attacker can tell
which fits better. No stage needs causality, so that encoders are read too.

Legend: B rows, T positions, D width of the cut, E width of the embeddings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from splitfl.audit.attack import Attack
from splitfl.audit.attacks.nearest import record_factor
from splitfl.audit.bottom import Bottom, is_causal, open_bottom
from splitfl.audit.linking import Release, releases
from splitfl.audit.proposals import Proposals
from splitfl.audit.view import Guesses, Knowledge, View

STEPS = {"quick": 100, "default": 600}
_ROWS = {"quick": 16, "default": 64}
"""Rows that are refined at most, the worst fitting first; the others keep the first guess."""
_CAUSAL_ROWS = {"quick": 4, "default": 12}
"""The same where positions depend on earlier ones alone: `map_decode` reads those better and sooner."""
_FITS = 1e-6
"""1 - cos at which a position is taken as read; float32 leaves about 1e-7."""
_LOOK = 50
"""Steps between two looks at what would be read."""
_WARM, _COLD = 0.2, 0.05
_BATCH = 8
_SWEEPS, _TRIED = {"quick": 6, "default": 12}, 8
"""Sweeps over a row's positions, and tokens of each kind that are tried at each."""
_AT_ONCE = 1 << 14
"""Positions put through the bottom at a time."""


def refine(
    bottom: Bottom, hidden: Sequence[torch.Tensor], init_ids: Sequence[torch.Tensor], steps: int = 600, *,
    learning_rate: float = 1e-3, relax: bool = True, sweeps: int = 12,
    likely: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Better token ids for rows than a first guess.

    Args:
        bottom: the bottom as the attacker has it.
        hidden: [T, D] of each row; no padding.
        init_ids: the first guess, [T] int64 of each row.
        steps: of the continuous stage, at most; the relaxation takes half as many. It ends when a row fits exactly, or
            when what would be read has not got better for four looks.
        learning_rate: of the continuous stage, for embeddings whose numbers are about 0.02; larger for larger ones.
        relax: whether the relaxation follows.
        sweeps: of swaps over all positions of a row, at most.
        likely: tokens [T, N] to try at each position of each row, beside those of the gradient.

    Returns:
        Token ids [T] of each row; never a worse fit to `hidden`, by mean cosine, than `init_ids`.
    """
    found = list(init_ids)
    order = sorted(range(len(hidden)), key=lambda row: len(hidden[row]))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = _Batch(bottom, [hidden[row] for row in rows], [init_ids[row] for row in rows])
        size = float(bottom.embeddings.square().mean().sqrt())
        batch.continuous(steps, max(learning_rate, learning_rate * size / 0.02))
        if relax:
            batch.relaxed(steps // 2)
        for place, row in enumerate(rows):
            ids = batch.ids[place, : len(hidden[row])]
            found[row] = _swapped(bottom, hidden[row], ids, sweeps, None if likely is None else likely[row])
    return found


def _swapped(
    bottom: Bottom, hidden: torch.Tensor, ids: torch.Tensor, sweeps: int, likely: torch.Tensor | None
) -> torch.Tensor:
    """`ids` [T] with single tokens swapped for better ones, as long as that helps."""
    table, places = bottom.embeddings, torch.arange(len(ids))
    best, ids = float("inf"), ids.clone()
    for _ in range(sweeps):
        free = table[ids].clone().requires_grad_(True)
        away = 1 - functional.cosine_similarity(bottom(inputs_embeds=free[None])[0], hidden, dim=-1)
        if bool((away <= _FITS).all()):
            break
        (slope,) = torch.autograd.grad(away.mean(), free)
        tried = (-slope @ table.T).topk(min(_TRIED, len(table)), dim=1).indices
        if likely is not None:
            tried = torch.cat([tried, likely], dim=1)
        misfit = _misfits(bottom, hidden, ids, tried)
        best = float(away.mean().detach())
        gain = best - misfit.amin(1)
        if float(gain.max()) <= 1e-9:
            break
        # All that help by themselves, together; else half of them, down to the best alone, which is known to help.
        order = gain.argsort(descending=True)[: int((gain > 1e-9).sum())]
        choice = tried[places, misfit.argmin(1)]
        while len(order):
            changed = ids.clone()
            changed[order] = choice[order]
            if len(order) == 1 or float(_misfits(bottom, hidden, changed, changed[:1, None])[0, 0]) < best:
                ids = changed
                break
            order = order[: (len(order) + 1) // 2]
    return ids


@torch.no_grad()
def _misfits(bottom: Bottom, hidden: torch.Tensor, ids: torch.Tensor, tried: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos over a row [T', N] for each of `tried` [T', N] alone in the place of the token that stands there;
    T' up to T."""
    count, width = tried.shape
    rows = ids.repeat(count * width, 1)
    rows[torch.arange(count * width), torch.arange(count).repeat_interleave(width)] = tried.flatten()
    found = []
    for part in rows.split(max(1, _AT_ONCE // len(ids))):
        states = bottom(inputs_embeds=bottom.embeddings[part])
        found.append((1 - functional.cosine_similarity(states, hidden[None], dim=-1)).mean(1))
    return torch.cat(found).view(count, width)


class _Batch:
    """A few rows, padded on the right."""

    def __init__(self, bottom: Bottom, hidden: Sequence[torch.Tensor], ids: Sequence[torch.Tensor]) -> None:
        self.bottom, self.table = bottom, bottom.embeddings
        self.target = torch.nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
        lengths = torch.tensor([len(each) for each in hidden])
        self.mask = (torch.arange(self.target.shape[1]) < lengths[:, None]).long()
        self.ids = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        """[B, T]: the best so far."""
        self.away = self.misfit(self.table[self.ids])
        """[B, T]: 1 - cos of each position with it."""

    def misfit(self, embeddings: torch.Tensor) -> torch.Tensor:
        """1 - cos [B, T] of `embeddings` [B, T, E]; 0 where there is padding. Differentiable."""
        states = self.bottom(inputs_embeds=embeddings, attention_mask=self.mask)
        return (1 - functional.cosine_similarity(states, self.target, dim=-1)) * self.mask

    @property
    def done(self) -> bool:
        """Whether every position of every row fits."""
        return bool((self.away <= _FITS).all())

    def continuous(self, steps: int, learning_rate: float) -> None:
        """Move embeddings freely."""
        free = self.table[self.ids].clone().requires_grad_(True)
        optimiser = torch.optim.AdamW([free], lr=learning_rate, weight_decay=0.01)
        unit = functional.normalize(self.table, dim=-1)
        half = 0.5 * (self.table**2).sum(-1)
        idle = 0
        for step in range(1, steps + 1):
            if self.done or idle >= 4:
                return
            loss = self.misfit(free).sum() / self.mask.sum()
            (free.grad,) = torch.autograd.grad(loss, free)
            optimiser.step()
            if step % _LOOK == 0 or step == steps:
                at = free.detach()
                better = self._look((at @ unit.T).argmax(-1))
                better |= self._look((at @ self.table.T - half).argmax(-1))
                idle = 0 if better else idle + 1

    def relaxed(self, steps: int) -> None:
        """Mixtures of tokens that grow purer."""
        if self.done or not steps:
            return
        start = functional.one_hot(self.ids, len(self.table)).float()
        free = start.requires_grad_(True)
        optimiser = torch.optim.AdamW([free], lr=0.05, weight_decay=0.01)
        for step in range(1, steps + 1):
            heat = _WARM * (_COLD / _WARM) ** (step / steps)
            mixed = torch.softmax(free / heat, dim=-1) @ self.table
            (free.grad,) = torch.autograd.grad(self.misfit(mixed).sum() / self.mask.sum(), free)
            optimiser.step()
            if step % _LOOK == 0 or step == steps:
                self._look(free.detach().argmax(-1))
                if self.done:
                    return

    @torch.no_grad()
    def _look(self, ids: torch.Tensor) -> bool:
        """Take `ids` [B, T] for the rows that they fit better, whole or where they fit better; whether any got better.

        The mean over a row decides, not each position alone: a token also changes the positions that see it.
        """
        away = self.misfit(self.table[ids])
        mixed = torch.where(away < self.away, ids, self.ids)
        improved = False
        for some, misfit in ((ids, away), (mixed, self.misfit(self.table[mixed]))):
            better = misfit.sum(1) < self.away.sum(1)
            self.ids = torch.where(better[:, None], some, self.ids)
            self.away = torch.where(better[:, None], misfit, self.away)
            improved |= bool(better.any())
        return improved


def run(view: View) -> Guesses:
    """Token ids of every row; see the module."""
    with torch.no_grad():
        bottom = open_bottom(view)
        rows = releases(view.sent, view.noise, latest=view.knowledge == Knowledge.EXACT)
        proposals = Proposals(bottom, seed=view.seed)
        likely = [_likely(view, proposals, row) for row in rows]
        guesses = [each[:, 0] for each in likely]
        fits = [_fit(bottom, row, ids) for row, ids in zip(rows, guesses, strict=True)]
    order = sorted((each for each in range(len(rows)) if fits[each] > _FITS), key=lambda each: -fits[each])
    most = (_CAUSAL_ROWS if is_causal(bottom) else _ROWS)[view.effort]
    chosen = sorted(order[:most], key=lambda each: len(rows[each].hidden))
    for start in range(0, len(chosen), _BATCH):
        some = chosen[start : start + _BATCH]
        hidden, init = [rows[each].hidden for each in some], [guesses[each] for each in some]
        refined = refine(
            bottom,
            hidden,
            init,
            STEPS[view.effort],
            sweeps=_SWEEPS[view.effort],
            likely=[likely[each] for each in some],
        )
        for each, ids in zip(some, refined, strict=True):
            guesses[each] = ids
        view.progress((start + len(some)) / len(chosen))
    found = {number: ids for row, ids in zip(rows, guesses, strict=True) for number in row.numbers}
    return Guesses(tokens=found, notes={"rows read": float(len(rows)), "rows refined": float(len(chosen))})


def _likely(view: View, proposals: Proposals, row: Release) -> torch.Tensor:
    """The discriminant's first tokens of each position [T, N]."""
    factor = record_factor(view.noise, len(row.hidden) * proposals.energy)
    scores = proposals.scores(row.hidden / factor, row.variance / factor**2)
    return scores.topk(min(_TRIED, scores.shape[1]), dim=1).indices


def _fit(bottom: Bottom, row: Release, ids: torch.Tensor) -> float:
    """Largest 1 - cos of a position."""
    return float((1 - functional.cosine_similarity(bottom(ids[None])[0], row.hidden, dim=-1)).max())


ATTACK = Attack(
    name="opt_invert",
    title="inputs optimised until they give the hidden state that crossed",
    source="BiSR (arXiv 2409.00960), forward stage; Song and Raghunathan (arXiv 2004.00053), relaxation",
    needs=frozenset({"hidden"}),
    finds="tokens",
    least=Knowledge.BASE,
    run=run,
    rows=_ROWS["default"],
    weak_point=(
        "it stays where the cosine has a local optimum, fits the noise along with the text, and refines the worst "
        "fitting rows only, so that many rows keep the first guess"
    ),
)
