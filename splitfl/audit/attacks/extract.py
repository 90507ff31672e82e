"""What a data holder takes of the owner's trunk by keeping what came back: a student trained on recorded traffic.

Every position of a split session is a regression pair (h_b, h_m) for the holder, and every backward call a product
g -> J^T g of the trunk's Jacobian. The student s has the trunk's shape, which the kit's configuration tells, and begins
as copies of the kit's nearest layers:

    |s(h_b) - h_m|^2 / |h_m|^2  +  w |J_s^T g - g_b|^2 / |g_b|^2              means over positions, and over rows

(matching derivatives: Czarnecki and others, "Sobolev Training for Neural Networks", 2017.) What it is worth is measured
on traffic that it was not trained on: put between bottom and top, it is compared with no trunk at all and with the real
one. The holder needs no query beyond its own training. One who also has an emulator has a better start: that is
`splitfl margin`. Legend: B rows, T positions, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from splitfl.audit.top import Top
from splitfl.audit.view import Sent
from splitfl.cut import PassThrough, module_at
from splitfl.data import IGNORED
from splitfl.errors import UsageError
from splitfl.kit import Kit

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """One row as the holder has it: what crossed, and its own labels."""

    sent: Sent
    """With its `output`; with `gradient` and `returned` where there was a backward."""
    labels: torch.Tensor
    """[T] int64, -100 where the loss does not count."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a student is trained."""

    steps: int = 600
    rate: float = 1e-3
    batch: int = 8
    derivatives: float = 0.3
    """Weight w of the Jacobian products; 0 leaves them out."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What stands in the trunk's place is worth, on held-out traffic."""

    loss: float
    """Mean negative log-likelihood of a counted token, in nats."""
    agreement: float
    """Share of the counted positions where the likeliest token is that of the real trunk."""
    error: float
    """Relative squared error of what comes out of the trunk's place, mean over positions."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One student."""

    tokens: int
    """Positions of recorded traffic that it was trained on."""
    student: Worth
    skipped: Worth
    """No trunk at all: the hidden state goes straight to the top."""
    true: Worth
    """The owner's trunk, as recorded."""

    @property
    def recovered(self) -> float:
        """Share of the trunk's use that the student has: 0 is no trunk, 1 the real one."""
        gap = self.skipped.loss - self.true.loss
        return (self.skipped.loss - self.student.loss) / gap if gap > _TINY else 0.0


# ---- the student


class _Done(Exception):
    """Leaves the forward pass behind the trunk's place."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Student(nn.Module):
    """Layers of the holder's own in the trunk's places: [B, T, D] in, [B, T, D] out.

    Args:
        kit: its nearest layers are what the student begins with.

    Raises:
        UsageError: a kit that holds no layer to begin with.
    """

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        plan = self.plan = kit.plan
        if not plan.party_layers:
            raise UsageError("The kit holds no layer that a student could begin as.", hint="use one with --bottom 1")
        self.model = kit.load(torch.float32).requires_grad_(False).eval()
        self.model.set_attn_implementation("eager")  # derivatives of derivatives need it
        layers = module_at(self.model.base_model, plan.stack)
        for index in plan.trunk_layers:
            nearest = min(plan.party_layers, key=lambda own, index=index: (abs(own - index), own))  # type: ignore[misc]
            layers[index] = copy.deepcopy(layers[nearest]).requires_grad_(True)
        for index in range(plan.bottom):
            layers[index] = PassThrough(layers[index], index, plan.returns_tuple)
        self._given: torch.Tensor | None = None
        layers[plan.trunk_layers.start].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[plan.trunk_layers.stop - 1].register_forward_hook(self._leave)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the student makes of `hidden` [B, T, D]; `mask` [B, T] int64."""
        self._given = hidden
        try:
            self.model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)
        except _Done as done:
            return done.hidden
        finally:
            self._given = None
        raise AssertionError("the trunk's place was not reached")

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((self._given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self._given})

    def _leave(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        raise _Done(output[0] if isinstance(output, tuple) else output)


def train_student(
    kit: Kit, traffic: Sequence[Recorded], settings: Settings | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Student:  # fmt: skip
    """A student of the trunk behind `traffic`.

    Args:
        kit: of the session.
        traffic: rows with their outputs.
        settings: of the training.
        progress: called with the share that is done.

    Raises:
        UsageError: no traffic, or rows without an output.
    """
    settings = settings or Settings()
    if not traffic or any(row.sent.output is None for row in traffic):
        raise UsageError("A student needs rows of which the trunk's output was kept.", expected="one row or more")
    student = Student(kit)
    learnt = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=settings.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps, settings.rate / 20)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        chosen = torch.randperm(len(traffic), generator=generator)[: settings.batch].tolist()
        loss = _loss(student, [traffic[at].sent for at in chosen], settings.derivatives)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
        progress((step + 1) / settings.steps)
    return student.requires_grad_(False)


def _loss(student: Student, rows: Sequence[Sent], weight: float) -> torch.Tensor:
    mask = _mask(rows)
    products = weight > 0 and all(row.gradient is not None and row.returned is not None for row in rows)
    hidden = _stacked([row.hidden for row in rows]).requires_grad_(products)
    output = student(hidden, mask)
    loss = _error(output, _stacked([_there(row.output) for row in rows]), mask).mean()
    if not products:
        return loss
    sent, back = (_stacked([_there(getattr(row, name)) for row in rows]) for name in ("gradient", "returned"))
    (own,) = torch.autograd.grad(output, hidden, sent, create_graph=True)
    sizes = back.pow(2).sum((1, 2)).clamp_min(_TINY)
    return loss + weight * ((own - back).pow(2).sum((1, 2)) / sizes).mean()


def _error(got: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Relative squared error of every position that `mask` counts."""
    counted = mask.bool()
    return (got - wanted)[counted].pow(2).sum(-1) / wanted[counted].pow(2).sum(-1).clamp_min(_TINY)


def _mask(rows: Sequence[Sent]) -> torch.Tensor:
    return _stacked([torch.ones(len(row.hidden), dtype=torch.int64) for row in rows])


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence([row.detach() for row in rows], batch_first=True)


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None  # noqa: S101
    return tensor


# ---- what it is worth


def extraction_curve(
    kit: Kit, traffic: Sequence[Recorded], held_out: Sequence[Recorded], budgets: Sequence[int],
    settings: Settings | None = None, *, top: Top | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Point]:  # fmt: skip
    """A student for each budget of tokens; more tokens hold all that fewer hold.

    Args:
        kit: of the session; causal.
        traffic: what may be trained on.
        held_out: what it is measured on; other rows.
        budgets: tokens; whole rows are taken as long as they fit. One that not one row fits is left out.
        settings: of the training.
        top: what makes tokens of an output; the kit's own, untuned, unless given.
        progress: called with the share that is done.
    """
    settings = settings or Settings()
    top = top or Top(kit.load(torch.float32), kit.plan)
    order = np.random.default_rng(settings.seed).permutation(len(traffic)).tolist()
    skipped = _worth(top, held_out, lambda hidden, _output, _mask: hidden)
    true = _worth(top, held_out, lambda _hidden, output, _mask: output)
    points = []
    wanted = sorted(set(budgets))
    for place, budget in enumerate(wanted):
        rows = list(_fitting([traffic[at] for at in order], budget))
        if not rows:
            continue
        student = train_student(
            kit, rows, settings,
            lambda share, place=place: progress((place + share) / len(wanted)),  # type: ignore[misc]
        )  # fmt: skip
        worth = _worth(top, held_out, lambda hidden, _output, mask, student=student: student(hidden, mask))  # type: ignore[misc]
        tokens = sum(len(row.labels) for row in rows)
        points.append(Point(tokens=tokens, student=worth, skipped=skipped, true=true))
    return points


def _fitting(rows: Sequence[Recorded], budget: int) -> Iterator[Recorded]:
    for row in rows:
        budget -= len(row.labels)
        if budget < 0:
            return
        yield row


@torch.no_grad()
def _worth(
    top: Top, rows: Sequence[Recorded], place: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Worth:
    losses, agreed, errors = [], [], []
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        sent = [row.sent for row in part]
        mask = _mask(sent)
        hidden, output = _stacked([one.hidden for one in sent]), _stacked([_there(one.output) for one in sent])
        got = place(hidden, output, mask)
        labels = nn.utils.rnn.pad_sequence([row.labels for row in part], batch_first=True, padding_value=IGNORED)
        said, real = (top(each, mask)[:, :-1] for each in (got, output))
        counted = labels[:, 1:] != IGNORED
        losses.append(nn.functional.cross_entropy(said[counted], labels[:, 1:][counted], reduction="none"))
        agreed.append((said.argmax(-1) == real.argmax(-1))[counted].float())
        errors.append(_error(got, output, mask))
    means = (float(torch.cat(parts).mean()) for parts in (losses, agreed, errors))
    return Worth(**dict(zip(("loss", "agreement", "error"), means, strict=True)))
