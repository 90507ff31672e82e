"""Labels from the gradient at the upper cut: of a language model they are the text itself.

Behind the top's last layer stand a norm and the head, position by position. With p what they predict there and J their
Jacobian, a label y gives the gradient J^T (p - e_y), up to a factor that all positions share. The attacker has what
the trunk answered, hence p and J: the label whose gradient has the direction of the one that crossed is the guess.
Layers of the top in between are undone first (`splitfl.audit.top.behind_layers`). The derivation is ours
(no paper that we know prints it); splitfl's rows of zeros follow arXiv 2609.04382, the classifier's attacks
Li et al., arXiv 2102.08504, section 3, and UnSplit (Erdogan et al., WPES 2022).

Legend: T positions of a row, D width, V vocabulary, K classes. The gradient at position t tells the token at t + 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, one_hot

from splitfl.audit.attack import Attack
from splitfl.audit.top import Top, behind_layers, match_labels, open_top
from splitfl.audit.view import Guesses, Knowledge, Noise, Sent, View
from splitfl.data import IGNORED

UNNAMED = -1
"""In `Guesses.answers`: there is a label, and this attack does not say which."""
_TRUST = 15.0
"""How much a cosine counts beside the log-probability that the top itself gives a token, where nothing fits well."""
_LABELLED = 0.5, 1e-4
"""A position has a label if its cosine is this share of the row's upper quartile, and its norm that of the largest."""
_SURE = 4.0
"""Standard deviations by which a row's norm must exceed what noise alone gives."""
_PROBES = 16
_NAMED = 8
"""Labels that each of two quick scores names for a position, to be looked at exactly."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What the gradient of one row says."""

    labels: torch.Tensor
    """[T] int64: label that each position was scored against, whether it was or not."""
    cosine: torch.Tensor
    """[T]: between the gradient and the one of the best label; 1 where it fits exactly."""
    norm: torch.Tensor
    """[T]: length of the gradient behind the top's layers."""


def decode_row(top: Top, output: torch.Tensor, gradient: torch.Tensor) -> Decoded:
    """The label behind each position's gradient, for `output` and `gradient` [T, D] at the upper cut."""
    state, ways = behind_layers(top, output, gradient)
    tail = _Tail(top, state)
    return max((tail.decode(each) for each in ways), key=lambda one: float(_upper(one.cosine)))


def answers_of(decoded: Decoded, labelled: torch.Tensor) -> torch.Tensor:
    """`Guesses.answers` of a row: [T], moved to where the label stands; -100 where `labelled` [T] says none."""
    return _shifted(torch.where(labelled, decoded.labels, IGNORED))


def labelled_positions(decoded: Decoded, gradient: torch.Tensor, noise: Noise, *, layers: int) -> torch.Tensor:
    """Which positions [T] the loss counts at, as far as can be told; `layers` is that of the top."""
    if not layers:
        return _not_only_noise(gradient, noise)
    share, least = _LABELLED
    fits = decoded.cosine > share * _upper(decoded.cosine)
    return fits & (decoded.norm > least * decoded.norm.max()) & (decoded.norm > 0)


def leak_auc(scores: Mapping[int, float], classes: Mapping[int, int], batches: Mapping[int, int]) -> list[float]:
    """For each batch with both classes, the area under the curve of `scores` against class 1 (Li et al., section 3.2).

    Args:
        scores, classes, batches: score, class (0 or 1) and batch of each `Sent`, by its number.

    Returns:
        One number a batch, at least 0.5: which end of the scores is class 1 is not held against the attack.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for number in scores:
        members[batches[number]].append(number)
    found = []
    for numbers in members.values():
        ones = torch.tensor([scores[n] for n in numbers if classes[n] == 1])
        zeros = torch.tensor([scores[n] for n in numbers if classes[n] != 1])
        if len(ones) and len(zeros):
            above = ones[:, None] - zeros
            area = float(((above > 0) + 0.5 * (above == 0)).float().mean())
            found.append(max(area, 1 - area))
    return found


# ---- attacks


def _grad_decode(view: View) -> Guesses:
    top, answers, sure = open_top(view), {}, []
    for sent, output, gradient in _rows(view):
        decoded = decode_row(top, output, gradient)
        labelled = labelled_positions(decoded, gradient, view.gradient_noise, layers=view.kit.plan.top)
        answers[sent.number] = answers_of(decoded, labelled)
        sure.append(float(decoded.cosine[labelled].mean()) if bool(labelled.any()) else 0.0)
    return Guesses(answers=answers, notes={"mean cosine": sum(sure) / max(len(sure), 1)})


def _grad_match(view: View) -> Guesses:
    """Soft labels by gradient descent, from the top's own prediction: needs no Jacobian that can be inverted."""
    top, answers = open_top(view), {}
    for sent, output, gradient in _rows(view):
        with torch.no_grad():
            start = top(output[None])[0] / 1.2
        soft = match_labels(top, output, gradient, start, steps=60 if view.effort == "quick" else 300)
        labelled = _not_only_noise(gradient, view.gradient_noise)
        answers[sent.number] = _shifted(torch.where(labelled, soft.argmax(-1), IGNORED))
    return Guesses(answers=answers)


def _grad_zero(view: View) -> Guesses:
    """Where the loss counts: rows of the gradient that are zero, or noise alone, before or behind the top's layers."""
    top = open_top(view) if view.kit.plan.top else None
    answers = {}
    for sent, output, gradient in _rows(view):
        if top is None:
            labelled = _not_only_noise(gradient, view.gradient_noise)
        else:
            decoded = decode_row(top, output, gradient)
            labelled = labelled_positions(decoded, gradient, view.gradient_noise, layers=view.kit.plan.top)
        answers[sent.number] = _shifted(torch.where(labelled, UNNAMED, IGNORED))
    return Guesses(answers=answers)


def _label_enumerate(view: View) -> Guesses:
    """UnSplit: the class whose gradient, through the head that the kit holds, has the direction of the one sent."""
    top, classes, margins = open_top(view), {}, []
    for sent, output, gradient in _rows(view):
        state = output[None].clone().requires_grad_(True)
        with torch.enable_grad():
            logits = top(state)
        shares = logits.detach().softmax(-1)
        fits = []
        for label in range(shares.shape[-1]):
            wanted = shares - one_hot(torch.tensor([label]), shares.shape[-1])
            (made,) = torch.autograd.grad(logits, state, wanted, retain_graph=True)
            fits.append(cosine_similarity(made.reshape(-1), gradient.reshape(-1), dim=0))
        best = torch.stack(fits).sort(descending=True)
        classes[sent.number] = int(best.indices[0])
        margins.append(float(best.values[0] - best.values[1]))
    return Guesses(classes=classes, notes={"mean margin": sum(margins) / max(len(margins), 1)})


def _label_norm(view: View) -> Guesses:
    return Guesses(scores={sent.number: float(gradient.norm()) for sent, _, gradient in _rows(view)})


def _label_direction(view: View) -> Guesses:
    """Along the first principal direction of all gradients, its sign so that the longer ones are above."""
    numbers, sums = [], []
    for sent, _, gradient in _rows(view):
        numbers.append(sent.number)
        sums.append(gradient.sum(0))
    if not sums:
        return Guesses()
    points = torch.stack(sums)
    axis = torch.linalg.svd(points, full_matrices=False).Vh[0]
    along = points @ axis
    along = along * torch.where((along * along.abs()).sum() < 0, -1.0, 1.0)
    cosines = along / points.norm(dim=-1).clamp(min=1e-30)
    return Guesses(scores=dict(zip(numbers, cosines.tolist(), strict=True)))


# ---- parts


def _rows(view: View) -> Iterator[tuple[Sent, torch.Tensor, torch.Tensor]]:
    """Each `Sent` that has output and gradient, with both."""
    for count, sent in enumerate(view.sent):
        if sent.output is not None and sent.gradient is not None:
            yield sent, sent.output, sent.gradient
        view.progress((count + 1) / len(view.sent))


class _Tail:
    """Norm and head at the states [T, D] of one row, where each position stands alone.

    The cosine of g with J^T (p - e_y) is wanted for all y at once: each inner product with J^T e_y is a number of J g
    or of J J^T p, each norm of J^T e_y comes from random directions u as the mean square of J u (Hutchinson's
    estimate).
    """

    def __init__(self, top: Top, state: torch.Tensor) -> None:
        self._state = state.clone().requires_grad_(True)
        with torch.enable_grad():
            self._logits = top.tail(self._state[None])[0]
            # J^T u is linear in u: its own derivative along v, taken backwards, is J v.
            self._pulls = torch.zeros_like(self._logits, requires_grad=True)
            (self._pulling,) = torch.autograd.grad(self._logits, self._state, self._pulls, create_graph=True)
        with torch.no_grad():
            self.log_shares = self._logits.detach().log_softmax(-1)
            self.shares = self.log_shares.exp()
            self._pulled = self._backward(self.shares)
            draws = torch.Generator().manual_seed(0)
            spread = torch.zeros_like(self.shares)
            for _ in range(_PROBES):
                spread += self._forward(torch.randn(state.shape, generator=draws)).square() / _PROBES
            square = self._pulled.square().sum(-1, keepdim=True) - 2 * self._forward(self._pulled) + spread
            self._length = square.clamp(min=1e-20).sqrt()

    @torch.no_grad()
    def decode(self, gradient: torch.Tensor) -> Decoded:
        """Which label fits `gradient` [T, D] best, and how well.

        What the top itself expects counts too, the more the worse the best label fits: a residual of variance
        1 - cosine^2 has that much less to say.
        """
        along = self._forward(gradient)
        norm = gradient.norm(dim=-1)
        plain = (self.shares * along).sum(-1, keepdim=True) - along
        fits = plain / self._length / norm[:, None].clamp(min=1e-30)
        some = torch.cat([plain.topk(_NAMED).indices, (_TRUST * fits + self.log_shares).topk(_NAMED).indices], dim=1)
        cosines = torch.stack([self._cosine(gradient, each) for each in some.T], dim=1)  # [T, candidates]
        usual = float(_upper(cosines.max(1).values).clamp(0, 1))
        trust = _TRUST / (1 - usual**2 + 1e-4)
        best = (trust * cosines + self.log_shares.gather(1, some)).argmax(1, keepdim=True)
        return Decoded(labels=some.gather(1, best)[:, 0], cosine=cosines.gather(1, best)[:, 0], norm=norm)

    def _forward(self, direction: torch.Tensor) -> torch.Tensor:
        (result,) = torch.autograd.grad(self._pulling, self._pulls, direction, retain_graph=True)
        return result

    def _backward(self, cotangent: torch.Tensor) -> torch.Tensor:
        (result,) = torch.autograd.grad(self._logits, self._state, cotangent, retain_graph=True)
        return result

    def _cosine(self, gradient: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        made = self._backward(self.shares - one_hot(labels, self.shares.shape[-1]))
        return cosine_similarity(made, gradient, dim=-1)


def _upper(cosines: torch.Tensor) -> torch.Tensor:
    return cosines.quantile(0.75)


def _not_only_noise(gradient: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Rows [T] that hold more than nothing, or more than noise of the public size."""
    squares, width = gradient.square().sum(-1), gradient.shape[-1]
    if not noise.sigma:
        return squares > 0
    return squares / noise.sigma**2 > width + _SURE * (2 * width) ** 0.5


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """From the position that predicts to the one that is predicted."""
    return torch.cat([labels.new_full((1,), IGNORED), labels[:-1]])


_TEXT = frozenset[str]({"output", "gradient", "language model"})


def _attack(name: str, title: str, run: Callable[[View], Guesses], weak_point: str, **more: object) -> Attack:
    told: dict[str, object] = {
        "needs": _TEXT,
        "finds": "answers",
        "source": "audit-attacks.md, gradients",
        "rows": 48,
    } | more
    return Attack(name=name, title=title, run=run, weak_point=weak_point, least=Knowledge.BASE, **told)  # type: ignore[arg-type]


_CLASSES = {"needs": frozenset({"output", "gradient", "classifier"})}
ATTACKS = (
    _attack(
        "grad-decode",
        "labels from the direction of the gradient",
        _grad_decode,
        "undoes the top's layers as the kit holds them: a top that was tuned far, or many layers of it, blur the guess",
    ),
    _attack(
        "grad-match",
        "labels by matching the gradient",
        _grad_match,
        "gradient descent on soft labels, from the top's own prediction; more steps, or better first labels, find more",
        source="BiSR, arXiv 2409.00960, backward stage; TAG",
        default=False,
    ),
    _attack(
        "grad-zero",
        "where answers begin and end",
        _grad_zero,
        "finds which positions have a label, not which; noise on gradients that fills the other rows hides it",
        source="arXiv 2609.04382",
    ),
    _attack(
        "label-enumerate",
        "the class whose gradient fits",
        _label_enumerate,
        "takes the head of the kit for the party's: one that was tuned far, or drawn anew, has other gradients",
        source="UnSplit, WPES 2022, label inference",
        finds="classes",
        **_CLASSES,
    ),
    _attack(
        "label-norm",
        "classes from the length of gradients",
        _label_norm,
        "for two classes of unequal number; a trained model is unsure of both alike",
        source="Li et al., arXiv 2102.08504, section 3.2",
        finds="scores",
        **_CLASSES,
    ),
    _attack(
        "label-direction",
        "classes from the direction of gradients",
        _label_direction,
        "for two classes; does not know by itself which of both ends is which",
        source="Li et al., arXiv 2102.08504, section 3.2",
        finds="scores",
        **_CLASSES,
    ),
)
