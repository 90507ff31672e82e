"""Bags of tokens from adapters that left in the clear: a federation's updates one by one, or that of an offline run.

An update is held against the different tokens of all rows of ``--train``: in a round that took only some of them, less
can be found than counts. What is drawn at random from the vocabulary, as many tokens, says what a bag is worth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from party.audit_beyond import Examination, Progress, Site
from party.audit_jobs import view_of
from party.tune import read_data
from splitfl.audit.attacks.update_invert import ATTACK
from splitfl.audit.controls import NOT_MORE, Control
from splitfl.audit.results import Cost, Outcome, named
from splitfl.audit.scoring import BLIND, Truth, score
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Guesses, Knowledge
from splitfl.metrics import peak_rss_bytes


def _why_not(site: Site) -> str | None:
    if not site.ground.recorded.updates:
        return "no update or adapter left in the clear"
    if site.ground.kit.plan.bottom == 0:
        return "the first layer is not the party's"
    return None


def _examine(site: Site, progress: Progress) -> Outcome | str:
    started = time.monotonic()
    ground = site.ground
    view = view_of(ground, Knowledge.BASE, (None, ()), (), defended=True, progress=progress)
    guesses = ATTACK.run(view)
    there = _tokens_of_rows(site)
    truth = _truth(site, there)
    figures = {name: found for name, found in score(guesses, truth, "bags", seed=ground.seed).items() if name != BLIND}
    if not figures:
        return "it said nothing that could be held against the rows"
    # An attack that says nothing is scored too: nothing is what it found.
    return Outcome(
        **named(ATTACK, knowledge=Knowledge.BASE.short, traffic="as it crossed"),
        domain="none",
        records=len(view.updates),
        sends=len(view.updates),
        figures=figures,
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
        notes=dict(guesses.notes),
        negative=_negative(site, guesses, there),
    )


def _tokens_of_rows(site: Site) -> torch.Tensor:
    """Different tokens of all training rows, special ones left out: [N] int64."""
    data = read_data(site.run.settings(), site.ground.kit)
    special = set(site.ground.kit.tokenizer().all_special_ids)
    return torch.tensor(sorted({token for example in data.train for token in example["input_ids"]} - special))


def _truth(site: Site, tokens: torch.Tensor) -> Truth:
    updates = site.ground.recorded.updates
    none = torch.zeros(len(tokens), dtype=torch.bool)
    return Truth(
        rows=tuple(
            TrueRow(number=u.number, dataset="train", row=u.number, ids=tokens, labels=tokens, special=none)
            for u in updates
        )
    )


def _negative(site: Site, guesses: Guesses, tokens: torch.Tensor) -> Control | None:
    """The same guesses against as many tokens that no row holds."""
    size = len(site.ground.kit.tokenizer())
    absent = torch.ones(size, dtype=torch.bool)
    absent[tokens] = False
    others = absent.nonzero()[:, 0]
    if len(others) < 2:
        return None
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(site.ground.seed))
    drawn = others[order[: len(tokens)]].sort().values
    found = score(guesses, _truth(site, drawn), "bags", seed=site.ground.seed).get("bag F1")
    if found is None:
        return None
    chance = _by_chance([len(bag) for bag in guesses.bags.values()], len(drawn), len(others))
    return Control(
        name="negative", attack=ATTACK.name, knowledge=Knowledge.BASE.short,
        expected=f"tokens that no row holds: not more than as many drawn blindly would hit, {chance:.3f}", found=found,
        works=found.low <= chance + NOT_MORE,
    )  # fmt: skip


def _by_chance(sizes: Sequence[int], wanted: int, vocabulary: int) -> float:
    """F1 that bags of these sizes get against `wanted` tokens, if their tokens are drawn blindly."""
    return max((2 * size * wanted / vocabulary / (size + wanted) for size in sizes if size), default=0.0)


EXAMINATION = Examination(
    name=ATTACK.name, knowledge="K1", default=True, needs_traffic=True, why_not=_why_not, run=_examine
)
