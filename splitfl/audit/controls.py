"""Whether the instrument works: an undefended twin, shuffled targets, an injected leak of known size.

A low score says something only if the same attack scores high where nothing is defended (positive), scores nothing
where there is nothing to find (negative), and rises by the right amount when a known part is left open (sensitivity).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from splitfl.audit.bottom import open_bottom
from splitfl.audit.intervals import Estimate
from splitfl.audit.scoring import BLIND, Figures, Truth, name_of
from splitfl.audit.top import open_top
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Knowledge, Sent, View
from splitfl.errors import DataError, InternalError
from splitfl.kit import Kit

POSITIVE = 0.99
"""What exhaustive decoding of an undefended causal bottom has to reach at K3."""
NOT_MORE = 0.02
"""How far the interval of a score on shuffled targets may stay above what blind guessing gets."""
LEAK = 0.25
"""Share of the records that is left open on purpose."""
TOLERANCE = 0.3
"""How far the rise may be off, as a share of the rise that was expected."""
SAME = 0.02
"""Relative distance from its twin up to which traffic counts as undefended: rounding on the wire is below it."""
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a control found."""

    name: str
    """``positive``, ``negative`` or ``sensitivity``."""
    attack: str
    knowledge: str
    expected: str
    """In words, with the bound that was set beforehand."""
    found: Estimate | None
    works: bool


# ---- the undefended twin


def make_twins(kit: Kit, sent: Sequence[Sent], truth: Mapping[int, TrueRow], adapter: Path | None) -> tuple[Sent, ...]:
    """The same rows through the same bottom, with nothing done to them.

    Only what the party does is undone: the trunk's answer stays the recorded one, and the gradient is that of the
    party's top on this answer. All of `sent` crossed with this adapter.

    Args:
        kit: of the run.
        sent: as recorded.
        truth: by number.
        adapter: of bottom and top when these rows crossed; None for untouched ones.

    Raises:
        DataError: the row behind one is not known any more.
    """
    view = View(kit=kit, knowledge=Knowledge.EXACT, adapter=adapter)
    bottom = open_bottom(view)
    top = open_top(view) if any(each.gradient is not None for each in sent) else None
    counted: dict[int, int] = {}
    for each in sent:
        row = _row_of(each, truth)
        counted[each.step] = counted.get(each.step, 0) + _targets(row)
    twins = []
    for each in sent:
        row = truth[each.number]
        with torch.no_grad():
            hidden = bottom(row.ids[None])[0]
        gradient = None
        if each.gradient is not None and each.output is not None and top is not None:
            logits_of = each.output[None].clone().requires_grad_(True)
            with torch.enable_grad():
                loss = _summed_loss(top(logits_of), row)
                (found,) = torch.autograd.grad(loss, logits_of)
            gradient = found[0] / max(counted[each.step], 1)
        twins.append(dataclasses.replace(each, hidden=hidden.float(), gradient=gradient, returned=None))
    return tuple(twins)


def _row_of(each: Sent, truth: Mapping[int, TrueRow]) -> TrueRow:
    row = truth.get(each.number)
    if row is None or len(row.ids) != len(each.hidden):
        raise DataError(
            "The rows behind this recording are not there any more, so its undefended twin cannot be made.",
            expected="the row files as they were when the run was recorded",
            hint="without a twin no score of a defended run is reported; record the run again",
        )
    return row


def _targets(row: TrueRow) -> int:
    return int((row.labels[1:] != _IGNORED).sum()) if isinstance(row.labels, torch.Tensor) else 1


def _summed_loss(logits: torch.Tensor, row: TrueRow) -> torch.Tensor:
    if isinstance(row.labels, int):
        return torch.nn.functional.cross_entropy(logits, torch.tensor([row.labels]), reduction="sum")
    return torch.nn.functional.cross_entropy(logits[0, :-1], row.labels[1:], reduction="sum", ignore_index=_IGNORED)


def distance(sent: Sequence[Sent], twins: Sequence[Sent]) -> float:
    """How far traffic is from its twin, as a share of the twin's norm: the larger of hidden states and gradients."""
    pairs = [(each.hidden, twin.hidden) for each, twin in zip(sent, twins, strict=True)]
    shares = [_relative(pairs)]
    gradients = [
        (each.gradient, twin.gradient)
        for each, twin in zip(sent, twins, strict=True)
        if each.gradient is not None and twin.gradient is not None
    ]
    if gradients:  # up to one factor: how many tokens a batch counted is not recorded with its parts
        scale = sum(float((a * b).sum()) for a, b in gradients) / max(
            sum(float((b * b).sum()) for _, b in gradients), 1e-30
        )
        shares.append(_relative([(a, scale * b) for a, b in gradients]))
    return max(shares)


def _relative(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return (off / size) ** 0.5 if size else 0.0


# ---- shuffled targets


def shuffle(truth: Truth, seed: int) -> Truth:
    """Every record's targets exchanged for those of another record; all sends of a record get the same ones."""
    records = {name_of(row): row for row in truth.rows}
    names = list(records)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    next_of = {names[a]: names[b] for a, b in zip(order, [*order[1:], *order[:1]], strict=True)}
    rows, positive, classes = [], {}, {}
    number_of = {name: row.number for name, row in records.items()}
    for row in truth.rows:
        other = records[next_of[name_of(row)]]
        rows.append(dataclasses.replace(row, ids=other.ids, labels=other.labels, special=other.special))
        theirs = number_of[next_of[name_of(row)]]
        positive[row.number] = truth.positive.get(theirs, other.dataset == "train")
        if theirs in truth.classes:
            classes[row.number] = truth.classes[theirs]
    return Truth(rows=tuple(rows), positive=positive, classes=classes)


def check_negative(attack: str, knowledge: str, figures: Figures) -> Control | None:
    """Whether a score on shuffled targets is what blind guessing gets; None where that is not known.

    Args:
        attack: name of the attack.
        knowledge: of the attacker, ``K0`` to ``K3``.
        figures: scores against shuffled targets.
    """
    if "AUC" in figures:
        found = figures["AUC"]
        return Control(
            name="negative", attack=attack, knowledge=knowledge, expected="AUC of 0.5 on shuffled targets",
            found=found, works=found.low <= 0.5 + NOT_MORE,
        )  # fmt: skip
    blind = figures.get(BLIND)
    if blind is None:
        return None
    return Control(
        name="negative", attack=attack, knowledge=knowledge,
        expected="on shuffled targets not more than blind guessing gets (a difference of 0)",
        found=blind, works=blind.low <= NOT_MORE,
    )  # fmt: skip


# ---- an injected leak


def hush(sent: Sequence[Sent], seed: int) -> tuple[Sent, ...]:
    """Traffic of the same shape and scale with nothing in it: the ground on which a leak of an undefended run shows."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        together = torch.cat(list(tensors))
        return together.mean(0), together.std(0)

    mean, spread = like([each.hidden for each in sent])
    gradients = [each.gradient for each in sent if each.gradient is not None]
    gradient_spread = torch.cat(gradients).std(0) if gradients else torch.zeros(0)

    def drawn(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return tuple(
        dataclasses.replace(
            each,
            hidden=mean + spread * drawn(each.hidden.shape),
            gradient=None if each.gradient is None else gradient_spread * drawn(each.gradient.shape),
            returned=None,
        )
        for each in sent
    )


def inject(
    ground: Sequence[Sent], open_: Sequence[Sent], truth: Mapping[int, TrueRow], *, share: float = LEAK, seed: int = 0
) -> tuple[tuple[Sent, ...], frozenset[int]]:
    """Put the open sends of a share of the records into other traffic.

    Args:
        ground: the other traffic.
        open_: the same sends, undefended.
        truth: by number; says which sends are one record.
        share: of the records, at least one.
        seed: of the choice.

    Returns:
        The mixed traffic and the numbers that are open in it.
    """
    names = sorted({name_of(truth[each.number]) for each in ground})
    if not names:
        raise InternalError("A leak was to be put into no traffic.")
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(share * len(names)))
    chosen = {names[at] for at in torch.randperm(len(names), generator=generator)[:count].tolist()}
    by_number = {each.number: each for each in open_}
    leaked = frozenset(each.number for each in ground if name_of(truth[each.number]) in chosen)
    return tuple(by_number[each.number] if each.number in leaked else each for each in ground), leaked


def check_sensitivity(
    attack: str, knowledge: str, *, ground: float, expected: float, mixed: Estimate, share: float
) -> Control:
    """Whether the score of mixed traffic rises as the leak's size says it should.

    Args:
        attack: name of the attack.
        knowledge: of the attacker.
        ground: score on the ground alone.
        expected: score of the guesses on the ground, with those on the open sends in the leaked ones' places.
        mixed: score of the attack on both together.
        share: of the records that was left open.
    """
    rise, found = expected - ground, mixed.value - ground
    return Control(
        name="sensitivity",
        attack=attack,
        knowledge=knowledge,
        expected=f"{share:.0%} of the records left open: a rise from {ground:.3f} to {expected:.3f}",
        found=mixed,
        works=rise > 0 and abs(found - rise) <= TOLERANCE * rise,
    )
