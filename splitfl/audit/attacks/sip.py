"""Learned inversion: a recurrent network that reads tokens off hidden states, taught on the attacker's own text.

`sip` is the inverter of BiSR (arXiv 2409.00960): one GRU layer of 256 units, dropout 0.1, a linear layer to the
vocabulary, cross-entropy by Adam (1e-3, weight decay 1e-5). Two things are ours, and make it stronger: the linear layer
sees the hidden state too, beside what the GRU made of it, and that part begins as the nearest embedding of a least
squares fit instead of at random. `sip-namoe` is its noise-adaptive mixture: one GRU
for each level of noise, a head that all share, and a gate over positions, trained in three stages. Both are taught on
*defended* states: what the public mechanism makes of the attacker's text, with fresh noise in every step.

Without auxiliary text, or with little of it, random tokens stand in, which the notes say.
Legend: B rows, T positions, D width, V vocabulary, X experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from splitfl.audit.attack import Attack
from splitfl.audit.bottom import Bottom, open_bottom
from splitfl.audit.linking import releases
from splitfl.audit.view import Effort, Guesses, Knowledge, Noise, View

UNITS, DROPOUT = 256, 0.1
RATE, DECAY = 1e-3, 1e-5
_BATCH, _PATIENCE = 8, 3
_EPOCHS = {"quick": 6, "default": 20}
_SECONDS = {"quick": 15.0, "default": 75.0}
"""Most time that teaching may take."""
_RANDOM_ROWS, _RANDOM_LENGTH = 400, 64
_LITTLE = 5000
"""Tokens of auxiliary text below which random rows are put beside it."""
_HELD_OUT = 10
"""One text in so many is for stopping early."""
_LEVELS = 0.0, 0.5, 1.0, 2.0
"""Noise of the experts, in units of the public sigma."""


class Head(nn.Module):
    """What a recurrent layer made [B, T, U], and the state itself [B, T, D], to logits [B, T, V]."""

    def __init__(self, units: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.drop, self.line = nn.Dropout(DROPOUT), nn.Linear(units + width, vocabulary)

    def forward(self, made: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        result: torch.Tensor = self.line(torch.cat([self.drop(made), hidden], dim=-1))
        return result

    @torch.no_grad()
    def begin(self, states: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """Begin as the nearest row of `table` [V, E], by the ridge regression of embeddings on `states` [N, D]."""
        mean = table.mean(0)
        gram = states.T @ states + 1e-3 * len(states) * torch.eye(states.shape[1])
        matrix = torch.linalg.solve(gram, states.T @ (table[ids] - mean))  # [D, E]
        rows = table - mean
        scale = 10.0 / rows.square().sum(-1).mean()
        self.line.weight[:, -states.shape[1] :] = scale * rows @ matrix.T
        self.line.weight[:, : -states.shape[1]] *= 0.1
        self.line.bias.copy_(-0.5 * scale * rows.square().sum(-1))


class GruInverter(nn.Module):
    """Hidden states [B, T, D] to logits of tokens [B, T, V]."""

    def __init__(self, width: int, vocabulary: int, *, both_ways: bool = False) -> None:
        super().__init__()
        self.read = nn.GRU(width, UNITS, batch_first=True, bidirectional=both_ways)
        self.head = Head(UNITS * (1 + both_ways), width, vocabulary)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        result: torch.Tensor = self.head(self.read(hidden)[0], hidden)
        return result


class Mixture(nn.Module):
    """One expert for each level of noise, one head, and a gate that weighs the experts of a row."""

    def __init__(self, width: int, vocabulary: int, experts: int, *, both_ways: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.GRU(width, UNITS, batch_first=True, bidirectional=both_ways) for _ in range(experts)
        )
        self.head = Head(UNITS * (1 + both_ways), width, vocabulary)
        self.narrow = nn.Linear(width, UNITS)
        self.attend = nn.MultiheadAttention(UNITS, 4, batch_first=True)
        self.gate = nn.Linear(UNITS, experts)
        self.only: int | None = None
        """The expert that answers alone; None for the gate's choice."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] to logits [B, T, V]."""
        if self.only is not None:
            chosen: torch.Tensor = self.head(self.experts[self.only](hidden)[0], hidden)
            return chosen
        narrow = self.narrow(hidden)
        seen = self.attend(narrow, narrow, narrow, need_weights=False)[0].mean(1)
        shares = self.gate(seen).softmax(-1)  # [B, X]
        states = torch.stack([expert(hidden)[0] for expert in self.experts], dim=-1)
        result: torch.Tensor = self.head((states * shares[:, None, None, :]).sum(-1), hidden)
        return result

    def gating(self) -> list[nn.Parameter]:
        """What the second stage trains."""
        return [*self.narrow.parameters(), *self.attend.parameters(), *self.gate.parameters()]


@dataclass(kw_only=True)
class Lessons:
    """The attacker's text as the bottom shows it, once: hidden states [T, D] and tokens [T], by text."""

    states: list[torch.Tensor]
    ids: list[torch.Tensor]
    mean: torch.Tensor
    """[D] and ..."""
    spread: torch.Tensor
    """... [D]: what every input is standardised with, from undefended states."""
    noise: Noise
    grid: Callable[[torch.Tensor], torch.Tensor]

    def batch(self, numbers: Sequence[int], level: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised states [B, T, D] with fresh noise, `level` times the public sigma; tokens, padded with -100."""
        states = [self.standard(self.grid(defended(self.states[n], self.noise, level))) for n in numbers]
        return pad_sequence(states, True), pad_sequence([self.ids[n] for n in numbers], True, -100)

    def together(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised, defended states [N, D] of all texts, and their tokens [N]."""
        states = [self.standard(self.grid(defended(each, self.noise))) for each in self.states]
        return torch.cat(states), torch.cat(self.ids)

    def standard(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the network is given for states [T, D]."""
        return (hidden - self.mean) / self.spread


@dataclass(frozen=True, kw_only=True)
class Taught:
    """An inverter, and how it did on text that it was not taught on."""

    network: nn.Module
    lessons: Lessons
    figures: dict[str, float]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, V] for the states [T, D] of one row, as they crossed."""
        result: torch.Tensor = self.network(self.lessons.standard(hidden)[None])[0]
        return result


def defended(hidden: torch.Tensor, noise: Noise, level: float = 1.0) -> torch.Tensor:
    """What the public mechanism makes of the states [T, D] of one row; the noise is drawn anew at each call."""
    whole = hidden.norm(dim=-1, keepdim=True) if noise.unit == "token" else hidden.norm()
    clipped = hidden * (noise.clip / whole.clamp(min=1e-30)).clamp(max=1.0)
    return clipped + torch.randn_like(clipped) * (noise.sigma * level) if noise.sigma and level else clipped


def teach(view: View, bottom: Bottom, *, mixture: bool = False) -> Taught:
    """An inverter for this bottom and this mechanism, taught on the view's auxiliary text."""
    torch.manual_seed(view.seed)
    texts = view.auxiliary
    if sum(map(len, texts)) < _LITTLE:
        texts = texts + random_texts(view, len(bottom.embeddings))
    lessons = prepare(view, bottom, texts)
    width, vocabulary = len(lessons.mean), len(bottom.embeddings)
    both = "bert" in view.kit.plan.model_type
    course = _Course(lessons, view.effort, view.progress)
    states, ids = lessons.together()
    network: nn.Module
    if mixture and view.noise.sigma:
        network = mixed = Mixture(width, vocabulary, len(_LEVELS), both_ways=both)
        mixed.head.begin(states, ids, bottom.embeddings)
        for number, level in enumerate(_LEVELS):
            mixed.only = number
            course.run(network, [*mixed.experts[number].parameters(), *mixed.head.parameters()], (level,), 0.5 / 4)
        mixed.only = None
        course.run(network, mixed.gating(), _LEVELS, 0.25)
        figures = course.run(network, list(network.parameters()), (1.0,), 0.25)
    else:
        network = plain = GruInverter(width, vocabulary, both_ways=both)
        plain.head.begin(states, ids, bottom.embeddings)
        figures = course.run(network, list(network.parameters()), (1.0,), 1.0)
    figures |= {"auxiliary tokens": float(sum(map(len, texts))), "random text": float(texts is not view.auxiliary)}
    return Taught(network=network.eval(), lessons=lessons, figures=figures)


def random_texts(view: View, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """Random tokens, where the attacker has no text."""
    draws = torch.Generator().manual_seed(view.seed)
    ids = torch.randint(vocabulary, (_RANDOM_ROWS, _RANDOM_LENGTH), generator=draws)
    return tuple(tuple(row) for row in ids.tolist())


@torch.no_grad()
def prepare(view: View, bottom: Bottom, texts: Sequence[Sequence[int]]) -> Lessons:
    """Pass texts through the bottom, row by row."""
    ids = [torch.tensor(text, dtype=torch.int64) for text in texts if len(text)]
    states = [bottom(each[None])[0] for each in ids]
    together = torch.cat(states)
    return Lessons(
        states=states, ids=ids, mean=together.mean(0), spread=together.std(0).clamp(min=1e-6),
        noise=view.noise, grid=coding_of(view),
    )  # fmt: skip


def coding_of(view: View) -> Callable[[torch.Tensor], torch.Tensor]:
    """The coding of activations, as the traffic shows it: few levels in a token are int4 or int8, zeros top-k."""
    some = next((sent.hidden for sent in view.sent if len(sent.hidden)), None)
    if some is None or view.noise.sigma:
        return lambda hidden: hidden
    kept = int((some != 0).sum(-1).max())
    if kept < some.shape[-1] // 2:
        return lambda hidden: _largest(hidden, kept)
    for levels in (7, 127):
        scale = some.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
        if bool(((some / scale - (some / scale).round()).abs() < 1e-3).all()):
            return lambda hidden, levels=levels: _rounded(hidden, levels)  # type: ignore[misc]
    return lambda hidden: hidden


def _largest(hidden: torch.Tensor, kept: int) -> torch.Tensor:
    columns = hidden.abs().topk(kept, dim=-1).indices
    return torch.zeros_like(hidden).scatter(-1, columns, hidden.gather(-1, columns))


def _rounded(hidden: torch.Tensor, levels: int) -> torch.Tensor:
    scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
    return (hidden / scale).round() * scale


class _Course:
    """Teaching, within the time that the effort allows, and stopped early on texts held out."""

    def __init__(self, lessons: Lessons, effort: Effort, progress: Callable[[float], None]) -> None:
        self.lessons, self.epochs, self.seconds = lessons, _EPOCHS[effort], _SECONDS[effort]
        numbers = list(range(len(lessons.ids)))
        held = numbers[::_HELD_OUT] if len(numbers) > 1 else numbers
        self.held, self.own = held, [n for n in numbers if n not in set(held)] or numbers
        self._progress, self._start = progress, time.monotonic()
        self._draws = torch.Generator().manual_seed(0)

    def run(
        self, network: nn.Module, tuned: list[nn.Parameter], levels: Sequence[float], share: float
    ) -> dict[str, float]:
        """Train `tuned` for `share` of the time; the best weights on held-out text are kept."""
        optimiser = torch.optim.Adam(tuned, lr=RATE, weight_decay=DECAY)
        end, idle = time.monotonic() + share * self.seconds, 0
        judged = levels[0] if len(levels) == 1 else 1.0
        best = self.score(network, judged), _copied(network)
        for _epoch in range(self.epochs):
            network.train()
            order = torch.randperm(len(self.own), generator=self._draws).tolist()
            for at in range(0, len(order), _BATCH):
                numbers = [self.own[n] for n in order[at : at + _BATCH]]
                level = levels[int(torch.randint(len(levels), (), generator=self._draws))]
                states, ids = self.lessons.batch(numbers, level)
                loss = cross_entropy(network(states).flatten(0, 1), ids.flatten())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                self._progress(min((time.monotonic() - self._start) / self.seconds, 0.99))
                if time.monotonic() > end:
                    break
            right = self.score(network, judged)
            if right > best[0]:
                best, idle = (right, _copied(network)), 0
            else:
                idle += 1
            if time.monotonic() > end or idle >= _PATIENCE or right == 1.0:
                break
        network.load_state_dict(best[1])
        return {"held-out accuracy": best[0]}

    @torch.no_grad()
    def score(self, network: nn.Module, level: float) -> float:
        """Share of the tokens of held-out text that are read rightly."""
        network.eval()
        right = counted = 0
        for at in range(0, min(len(self.held), 64), _BATCH):
            states, ids = self.lessons.batch(self.held[at : at + _BATCH], level)
            right += int((network(states).argmax(-1) == ids).sum())
            counted += int((ids >= 0).sum())
        return right / max(counted, 1)


def _copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _run(view: View, *, mixture: bool) -> Guesses:
    rows = releases(view.sent, view.noise, latest=view.knowledge == Knowledge.EXACT)
    # Several sends of a row are averaged, and the network is taught on the noise that is left.
    left = statistics.median(row.variance for row in rows) ** 0.5 if rows else view.noise.sigma
    sigma = left if view.noise.sigma else 0.0
    taught = teach(replace(view, noise=replace(view.noise, sigma=sigma)), open_bottom(view), mixture=mixture)
    read = [(row.numbers, taught.logits(row.hidden).argmax(-1)) for row in rows]
    view.progress(1.0)
    notes = taught.figures | {"rows read": float(len(rows))}
    return Guesses(tokens={number: ids for numbers, ids in read for number in numbers}, notes=notes)


def _plain(view: View) -> Guesses:
    return _run(view, mixture=False)


def _namoe(view: View) -> Guesses:
    return _run(view, mixture=True)


_WEAK = "learns from little text in little time: more text, nearer to the rows, reads more"
ATTACKS = (
    Attack(
        name="sip",
        title="a network taught to read hidden states",
        source="BiSR, arXiv 2409.00960, semi-white-box inversion; taught on defended states",
        needs=frozenset({"hidden"}),
        finds="tokens",
        least=Knowledge.BASE,
        run=_plain,
        weak_point=_WEAK,
        taught=True,
    ),
    Attack(
        name="sip-namoe",
        title="the same with an expert for each level of noise",
        source="BiSR, arXiv 2409.00960, noise-aware mixture of experts",
        needs=frozenset({"hidden"}),
        finds="tokens",
        least=Knowledge.BASE,
        run=_namoe,
        weak_point=_WEAK,
        taught=True,
        default=False,
    ),
)
