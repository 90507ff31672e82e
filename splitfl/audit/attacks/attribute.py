"""An attribute of a row that the task does not ask for, by a probe on what crosses.

A network of one hidden layer reads the mean of a row's hidden states, and their spread over positions, and is taught
on texts whose attribute the attacker knows (`View.labelled`), passed through the bottom it knows and defended as the
public mechanism defends. Its worth is judged as in SAP (arXiv 2312.15603): balanced accuracy, less what naming the
most frequent value gives, and less what guessing by frequency gives.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from splitfl.audit.attack import Attack
from splitfl.audit.attacks.sip import coding_of, defended
from splitfl.audit.bottom import open_bottom
from splitfl.audit.view import Guesses, Knowledge, View
from splitfl.errors import UsageError

_UNITS, _RATE, _DECAY = 64, 3e-3, 1e-2
_EPOCHS = {"quick": 100, "default": 300}
_DRAWS = 4
"""Draws of the noise that each labelled text is taught with."""


def balanced_accuracy(guesses: Mapping[int, int], truth: Mapping[int, int]) -> dict[str, float]:
    """How well an attribute was told, over the rows in `truth`; a row without a guess counts as wrong.

    Returns:
        ``balanced accuracy``: mean over the values of the share of its rows that were named rightly;
        ``over majority``: less 1 / K, what naming the most frequent of K values always gives;
        ``over frequency``: plain accuracy less what drawing guesses by their frequency gives, the sum of p^2.
    """
    values = sorted(set(truth.values()))
    recalls = []
    for value in values:
        rows = [number for number, true in truth.items() if true == value]
        recalls.append(sum(guesses.get(number) == value for number in rows) / len(rows))
    shares = [sum(true == value for true in truth.values()) / len(truth) for value in values]
    plain = sum(guesses.get(number) == true for number, true in truth.items()) / len(truth)
    balanced = sum(recalls) / len(recalls)
    return {
        "balanced accuracy": balanced,
        "over majority": balanced - 1 / len(values),
        "over frequency": plain - sum(share**2 for share in shares),
    }


def features(hidden: torch.Tensor) -> torch.Tensor:
    """[2 D] for the states [T, D] of one row: mean and standard deviation over positions."""
    return torch.cat([hidden.mean(0), hidden.std(0, correction=0)])


def _run(view: View) -> Guesses:
    if len({value for _, value in view.labelled}) < 2:
        raise UsageError(
            "The attribute probe was given no texts, or texts of one value alone.",
            expected="labelled auxiliary texts with two values or more",
            hint="leave the attack `attribute` out, or name a file of labelled texts",
        )
    torch.manual_seed(view.seed)
    points, values = _lessons(view)
    mean, spread = points.mean(0), points.std(0).clamp(min=1e-6)
    network, held = _taught((points - mean) / spread, values, _EPOCHS[view.effort])
    classes, scores = {}, {}
    with torch.no_grad():
        for sent in view.sent:
            shares = network((features(sent.hidden) - mean) / spread).softmax(-1)
            classes[sent.number], scores[sent.number] = int(shares.argmax()), float(shares[-1])
    view.progress(1.0)
    return Guesses(classes=classes, scores=scores, notes={"held-out balanced accuracy": held})


@torch.no_grad()
def _lessons(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, 2 D] of the labelled texts, with noise drawn several times, and their attribute [N]."""
    bottom, coding = open_bottom(view), coding_of(view)
    draws = _DRAWS if view.noise.sigma else 1
    points, values = [], []
    for count, (ids, value) in enumerate(view.labelled):
        hidden = bottom(torch.tensor([ids]))[0]
        points += [features(coding(defended(hidden, view.noise))) for _ in range(draws)]
        values += [value] * draws
        view.progress(0.5 * (count + 1) / len(view.labelled))
    return torch.stack(points), torch.tensor(values)


def _taught(points: torch.Tensor, values: torch.Tensor, epochs: int) -> tuple[nn.Module, float]:
    """The probe that did best on every fifth text, and its balanced accuracy there."""
    count = int(values.max()) + 1
    network = nn.Sequential(nn.Linear(points.shape[1], _UNITS), nn.ReLU(), nn.Dropout(0.2), nn.Linear(_UNITS, count))
    held = torch.arange(len(points)) // _DRAWS % 5 == 0
    weights = 1 / values[~held].bincount(minlength=count).clamp(min=1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    best, kept = -1.0, network
    for _ in range(epochs):
        network.train()
        loss = cross_entropy(network(points[~held]), values[~held], weight=weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        network.eval()
        with torch.no_grad():
            found = network(points[held]).argmax(-1).tolist()
        told = balanced_accuracy(dict(enumerate(found)), dict(enumerate(values[held].tolist())))["balanced accuracy"]
        if told > best:
            best, kept = told, copy.deepcopy(network)
    return kept, best


ATTACK = Attack(
    name="attribute",
    title="an attribute that the task does not ask for",
    source="SAP, arXiv 2312.15603, attribute inference",
    needs=frozenset({"hidden", "labelled"}),
    finds="classes",
    least=Knowledge.BASE,
    run=_run,
    weak_point="as good as the attacker's labelled texts: few of them, or of another kind, tell little",
    default=False,
)
