"""Reading activations from left to right: which token, put behind those already found, gives this hidden state?

A causal bottom's state at position t depends on the tokens up to t alone, so that each is found by trying candidates
(Nikolaou and others, "Language Models are Injective and Hence Invertible", arXiv 2510.15511, section on SipIt; Thomas
and others, "Hidden No More", arXiv 2505.18332). Where noise is added, the candidates are weighed as the noise demands:

    squared distance / (2 s^2) - log p(token | tokens before it)        summed over positions, least wins

with s^2 the known variance, or what the distances so far show where that is more (a tuned bottom at K1). The beam
keeps the best few rows, since what looks wrong now may look right one position on. Rows that crossed several times are
read once, from their mean where noise was fresh (`splitfl.audit.linking`). Rows that a mechanism clipped are compared
up to the one factor that clipping is.

Legend: R rows, H hypotheses, N candidates of each, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from splitfl.audit.attack import Attack
from splitfl.audit.bottom import Bottom, open_bottom
from splitfl.audit.linking import Release, releases
from splitfl.audit.proposals import Proposals
from splitfl.audit.stepping import Prior, Stepper, cached_steps_hold
from splitfl.audit.view import Guesses, Knowledge, Noise, View

EXACT = 1e-3
"""Relative distance at which a token fits in any case; from a tuned bottom none does, and the usual distance counts."""
MISFIT = 2.0
"""Times the usual distance, beyond which more tokens are tried, unless one of those tried stands out."""
CLEAR = 0.7
"""Share of the next one's distance at which the nearest token stands out: behind a tuned bottom distances differ from
place to place, but the right token is nearer than all others."""
FAR = 25.0, 0.2
"""Times the usual distance, and distance in any case, beyond which nothing stands out: the nearest of a few wrong
tokens may be far from the next one too."""
CLOSE = 0.02
"""Usual relative distance up to which a whole row is taken as read when each of its positions fits."""
_MARGIN = 20.0
"""Nats behind the best hypothesis of a row at which another one is given up."""
_AT_ONCE = 32
_SIZES = {"quick": (2, 16), "default": (6, 48)}
"""Hypotheses and candidates under noise."""
_SMALL = 256
"""Vocabularies up to this are tried whole."""


@dataclass
class _Work:
    """What all rows share."""

    bottom: Bottom
    proposals: Proposals
    noise: Noise
    width: int
    tried: int
    cached: bool
    prior: Prior | None
    whole: int
    """The most tokens of the vocabulary that are tried at one position."""
    distances: list[float] = field(default_factory=list)
    """Relative distance of each token that was settled on."""
    residuals: list[float] = field(default_factory=list)
    """Its squared distance for each coordinate."""
    queries: int = 0
    widened: int = 0
    """Positions at which the whole vocabulary was tried."""
    first: torch.Tensor | None = None
    """[V, D]: each token's state where it stands first."""

    @property
    def usual(self) -> float:
        """Median of the relative distances so far."""
        return _median(self.distances)

    def variance(self, known: float) -> float:
        """On each coordinate: what is known, or what is seen where that is more."""
        return max(known, _median(self.residuals), 1e-12)


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values[-2000:]).median()) if values else 0.0


def run(view: View) -> Guesses:
    """Token ids of every row; see the module."""
    work = _prepare(view)
    found: dict[int, torch.Tensor] = {}
    read = releases(view.sent, view.noise, latest=view.knowledge == Knowledge.EXACT)
    waiting = read if view.noise.sigma else [each for each in read if not _whole_row(work, each, found)]
    waiting = sorted(waiting, key=lambda release: len(release.hidden))
    for start in range(0, len(waiting), _AT_ONCE):
        some = waiting[start : start + _AT_ONCE]
        for release, ids in zip(some, _Reading(work, some).run(), strict=True):
            found.update(dict.fromkeys(release.numbers, ids))
        view.progress((start + len(some)) / len(waiting))
    notes = {"tokens put through the bottom": float(work.queries + work.proposals.queries)}
    notes |= {"rows read": float(len(read)), "usual relative distance": work.usual}
    notes |= {"positions with the whole vocabulary": float(work.widened)}
    return Guesses(tokens=found, notes=notes)


@torch.no_grad()
def _prepare(view: View) -> _Work:
    bottom = open_bottom(view)
    longest = max((len(sent.hidden) for sent in view.sent), default=1)
    noisy = view.noise.name not in ("none", "quantise", "topk")
    width, tried = _SIZES[view.effort] if noisy else (1, 8)
    if noisy and len(bottom.embeddings) <= _SMALL:
        tried = len(bottom.embeddings)
    prior = Prior(view.model) if noisy and view.model is not None and view.kit.plan.task == "causal-lm" else None
    work = _Work(
        bottom, Proposals(bottom, seed=view.seed), view.noise, width, tried, prior=prior,
        cached=view.kit.plan.bottom > 0 and cached_steps_hold(bottom, longest),
        whole=512 if view.effort == "quick" else len(bottom.embeddings),
    )  # fmt: skip
    every = torch.arange(len(bottom.embeddings))
    work.first = torch.cat([bottom(part[:, None])[:, 0] for part in every.split(2048)])
    work.queries += len(every)
    return work


@torch.no_grad()
def _whole_row(work: _Work, release: Release, found: dict[int, torch.Tensor]) -> bool:
    """Whether the likeliest token of every position, put together to a row, gives the very states that crossed."""
    assert work.first is not None  # noqa: S101
    ids = work.proposals.guess(release.hidden)
    ids[0] = (work.first - release.hidden[0]).norm(dim=-1).argmin()
    distances = (work.bottom(ids[None])[0] - release.hidden).norm(dim=-1) / release.hidden.norm(dim=-1)
    work.queries += len(ids)
    usual = float(distances.median())
    if usual > CLOSE or bool((distances > max(EXACT, 4 * usual)).any()):
        return False
    work.distances.extend(distances.tolist())
    found.update(dict.fromkeys(release.numbers, ids))
    return True


class _Reading:
    """Some rows, read in step: each position of all of them at once.

    Hypotheses of a row stand together. Of each is kept what its score is made of: with h the states that crossed and f
    those it would give, sums over positions of <h, f> and <f, f>, and the log-probability of its tokens.
    """

    def __init__(self, work: _Work, rows: Sequence[Release]) -> None:
        self.work, self.rows = work, rows
        self.stepper = Stepper(work.bottom, len(rows), cached=work.cached)
        self.row = torch.arange(len(rows))
        """[H]: whose hypothesis it is."""
        self.inner, self.own, self.log_p = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(3))
        self.found: list[torch.Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(rows)
        self.known = torch.tensor([row.variance for row in rows])
        self.expected = torch.tensor([_expected_factor(work, row) for row in rows])
        if work.prior is not None:
            work.prior.begin()

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """Token ids [T] of each row."""
        for place in range(max(len(row.hidden) for row in self.rows)):
            self._finish(place)
            target = torch.stack([self.rows[row].hidden[place] for row in self.row.tolist()])
            candidates, states, log_p = self._candidates(place, target)
            self._settle(target, candidates, states, log_p)
        self._finish(max(len(row.hidden) for row in self.rows))
        self.work.queries += self.stepper.queries
        return self.found

    # ---- candidates

    def _candidates(self, place: int, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [H, N], their states [H, N, D] and log-probabilities [H, N], for `target` [H, D]."""
        work = self.work
        likely = self._first_scores(target) if place == 0 else self._scores(target)
        log_p = torch.zeros_like(likely)
        if work.prior is not None:
            log_p = work.prior.log_probabilities(len(self.row))[:, : likely.shape[1]]
            likely = likely + log_p
        order = likely.topk(min(work.tried, likely.shape[1]), dim=1).indices
        states = self._crossed(self._states(place, order), target)
        if work.width == 1:
            order, states = self._widened(place, target, likely, order, states)
        return order, states, log_p.gather(1, order)

    def _scores(self, target: torch.Tensor) -> torch.Tensor:
        """The discriminant's [H, V], for `target` [H, D] as it was before clipping."""
        factor = self._factor(self.inner[:, None], self.own[:, None]).float()
        if self.work.noise.unit == "token":
            factor = torch.full_like(factor, min(1.0, self.work.noise.clip / math.sqrt(self.work.proposals.energy)))
        variance = self.work.variance(float(self.known.max()))
        return self.work.proposals.scores(target / factor, variance / float(factor.mean()) ** 2)

    def _first_scores(self, target: torch.Tensor) -> torch.Tensor:
        """Log-likelihood [H, V] where no context adds anything."""
        assert self.work.first is not None  # noqa: S101
        states = self.work.first * _token_factor(self.work.noise, self.work.first)
        inner, own = target.double() @ states.double().T, (states.double() ** 2).sum(1)[None]
        factor = self._factor(inner, own)
        return (2 * factor * inner - factor**2 * own) / (2 * self.work.variance(float(self.known.max())))

    def _crossed(self, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of `states` [H, N, D], the numbers that `topk` let through at this position; the others came as zeros."""
        return states * (target != 0)[:, None] if "topk" in self.work.noise.name else states

    def _states(self, place: int, tokens: torch.Tensor) -> torch.Tensor:
        if place == 0:
            assert self.work.first is not None  # noqa: S101
            return self.work.first[tokens]
        return self.stepper.states(tokens)

    def _widened(
        self, place: int, target: torch.Tensor, likely: torch.Tensor, order: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the best of many more in the first column, for hypotheses of which no candidate fits."""
        if place == 0:
            return order, states
        work = self.work
        distance, clear = _nearest_two((states - target[:, None]).norm(dim=-1))
        distance = distance / target.norm(dim=-1)
        for size in sorted({min(64, likely.shape[1]), min(work.whole, likely.shape[1])}):
            settled = (distance <= max(EXACT, MISFIT * work.usual)) | (
                clear & (distance <= max(FAR[0] * work.usual, FAR[1]))
            )
            misfits = (~settled).nonzero()[:, 0]
            for index in misfits.split(1 if size > 64 else 32) if len(misfits) else ():
                few = self.stepper.only(index)
                more = likely[index].topk(size, dim=1).indices
                seen = self._crossed(few.states(more), target[index])
                work.queries += few.queries
                work.widened += len(index) * (size == likely.shape[1])
                away = (seen - target[index, None]).norm(dim=-1)
                best = away.argmin(dim=1)
                each = torch.arange(len(index))
                order[index, 0], states[index, 0] = more[each, best], seen[each, best]
                distance[index] = away[each, best] / target[index].norm(dim=-1)
                clear[index] = _nearest_two(away)[1]
        return order, states

    # ---- scores

    def _settle(
        self, target: torch.Tensor, candidates: torch.Tensor, states: torch.Tensor, log_p: torch.Tensor
    ) -> None:
        """Keep the best few hypotheses of each row, one token longer."""
        work = self.work
        states = states * _token_factor(work.noise, states)
        # In float64: what tells two tokens apart is a small difference of these sums.
        inner = self.inner[:, None] + (states.double() * target[:, None]).sum(-1)
        own = self.own[:, None] + (states.double() ** 2).sum(-1)
        log_p = self.log_p[:, None] + log_p
        factor = self._factor(inner, own)
        variance = work.variance(float(self.known.max()))
        # The squared norm of what crossed is the same for all of a row, and left out.
        score = (2 * factor * inner - factor**2 * own) / (2 * variance) + log_p
        parents, chosen = self._best(score)
        self.inner, self.own, self.log_p = inner[parents, chosen], own[parents, chosen], log_p[parents, chosen]
        self._note(target[parents], states[parents, chosen], factor[parents, chosen].float(), self.row[parents])
        self.row = self.row[parents]
        tokens = candidates[parents, chosen]
        self.stepper.grow(parents, tokens)
        if work.prior is not None:
            work.prior.grow(parents, tokens)

    def _factor(self, inner: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What clipping a record multiplied it with, as far as is seen; drawn towards what its length lets expect."""
        if self.work.noise.unit != "record" or math.isinf(self.work.noise.clip):
            return torch.ones_like(inner)
        expected = self.expected[self.row][:, None]
        # The mean of a normal distribution a third as wide as it is high, and of what the positions so far say.
        weight = self.work.variance(float(self.known.max())) / (expected / 3) ** 2
        return ((inner + weight * expected) / (own + weight)).clamp(0.01, 1)

    def _best(self, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hypothesis and column of the best `width` of each row, those far behind left out; rows stay together."""
        if self.work.width == 1:
            return torch.arange(len(score)), score.argmax(dim=1)
        rows, slots = self.row.unique(return_inverse=True)
        start = torch.searchsorted(self.row, rows)
        place = torch.arange(len(score)) - start[slots]
        table = score.new_full((len(rows), self.work.width, score.shape[1]), -math.inf)
        table[slots, place] = score
        best = table.flatten(1).topk(min(self.work.width, table[0].numel()), dim=1)
        kept = best.values - best.values[:, :1] > -_MARGIN  # large scores would swallow the margin
        row, column = kept.nonzero(as_tuple=True)
        index = best.indices[row, column]
        return start[row] + index // score.shape[1], index % score.shape[1]

    def _note(self, target: torch.Tensor, states: torch.Tensor, factor: torch.Tensor, row: torch.Tensor) -> None:
        """Distances of the best hypothesis of each row."""
        leading = torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])
        away = (target - factor[:, None] * states)[leading].norm(dim=-1)
        self.work.distances.extend((away / target[leading].norm(dim=-1)).tolist())
        self.work.residuals.extend((away**2 / target.shape[1]).tolist())

    def _finish(self, place: int) -> None:
        """Take the best hypothesis of each row that ends before `place`; go on with the others."""
        ended = torch.tensor([len(row.hidden) == place for row in self.rows])[self.row]
        if not bool(ended.any()):
            return
        for index in ended.nonzero()[:, 0].flip(0).tolist():  # the best stands first, and overwrites the others
            self.found[int(self.row[index])] = self.stepper.ids[index]
        left = (~ended).nonzero()[:, 0]
        if not len(left):
            return
        queries, self.stepper = self.stepper.queries, self.stepper.only(left)
        self.stepper.queries = queries
        if self.work.prior is not None:
            self.work.prior.keep(left)
        self.row, self.inner, self.own, self.log_p = (
            each[left] for each in (self.row, self.inner, self.own, self.log_p)
        )


def _nearest_two(away: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least of the distances [H, N], and whether it is far below the next one."""
    if away.shape[1] < 2:
        return away[:, 0], torch.zeros(len(away), dtype=torch.bool)
    two = away.topk(2, dim=1, largest=False).values
    return two[:, 0], two[:, 0] < CLEAR * two[:, 1]


def _token_factor(noise: Noise, states: torch.Tensor) -> torch.Tensor | float:
    """What clipping each position multiplies `states` [..., D] with: the attacker clips its candidates too."""
    if noise.unit != "token" or math.isinf(noise.clip):
        return 1.0
    return (noise.clip / states.norm(dim=-1, keepdim=True)).clamp(max=1.0)


def _expected_factor(work: _Work, release: Release) -> float:
    """What clipping a record of this length multiplies it with, going by the usual norm of a state."""
    if math.isinf(work.noise.clip):
        return 1.0
    return min(1.0, work.noise.clip / math.sqrt(len(release.hidden) * work.proposals.energy))


ATTACK = Attack(
    name="map_decode",
    title="left-to-right decoding of activations against the bottom itself",
    source="SipIt (arXiv 2510.15511) and Hidden No More (arXiv 2505.18332); the noise-aware form is splitfl's own",
    needs=frozenset({"hidden", "causal"}),
    finds="tokens",
    least=Knowledge.BASE,
    run=run,
    weak_point=(
        "it tries only the likeliest candidates where noise is added, knows no text of the rows' domain, and at K1 "
        "treats what tuning moved as if it were noise"
    ),
)
