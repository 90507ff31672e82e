"""What the tuned adapter reveals: whether a row was among those that it was tuned on. Not of the traffic at all.

The attacker is whoever gets the adapter and has the whole model. Members are rows of ``--train``, others rows of
``--eval``: where these are no random halves of one corpus, the attack tells their topics apart and looks stronger.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from party.audit_beyond import Examination, Progress, Site
from party.tune import read_data
from splitfl.adapters import open_adapter
from splitfl.audit.attacks.mia import row_statistics, scores_of
from splitfl.audit.controls import check_negative, shuffle
from splitfl.audit.intervals import curve
from splitfl.audit.results import Cost, Outcome
from splitfl.audit.scoring import Truth, score
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Guesses
from splitfl.data import Collator, Example
from splitfl.load import quiet_library
from splitfl.metrics import peak_rss_bytes

NAME = "membership"
_MOST = 200
_KNOWLEDGE = "K3"


def no_adapter(site: Site) -> str | None:
    """Why the adapter of a run cannot be asked about rows; None if it can."""
    if site.ground.kit.plan.task != "causal-lm":
        return "the model is a classifier"
    if site.ground.model is None:
        return "the whole model was not given (--model)"
    if not (site.run.adapter / "adapter_config.json").is_file():
        return "the run has no adapter"
    return None


def no_members(site: Site) -> str | None:
    """Why members cannot be told from others; None if they can."""
    return no_adapter(site) or ("no rows were held out" if site.run.settings().eval is None else None)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """As many members as others: the first ``count`` examples are members."""

    examples: list[Example]
    count: int
    collator: Collator

    @property
    def rows(self) -> tuple[TrueRow, ...]:
        """The same for scoring."""
        return tuple(
            TrueRow(
                number=number, dataset="train" if number < self.count else "held-out", row=number % self.count,
                ids=torch.tensor(example["input_ids"]), labels=torch.tensor(example["labels"]),
                special=torch.zeros(len(example["input_ids"]), dtype=torch.bool),
            )
            for number, example in enumerate(self.examples)
        )  # fmt: skip


def pool_of(site: Site, most: int = _MOST) -> Pool:
    """Members and others of the run, at most `most` of each."""
    data = read_data(site.run.settings(), site.ground.kit)
    held_out: list[Example] = list(data.held_out or ())
    count = min(most, len(data.train), len(held_out))
    return Pool(examples=[*list(data.train)[:count], *held_out[:count]], count=count, collator=data.collator)


def _attack(site: Site, progress: Progress) -> Outcome:
    """Score members and others by how much the tuning lowered their loss (Carlini and others 2021, section 5.2)."""
    started = time.monotonic()
    ground = site.ground
    pool = pool_of(site)
    before = row_statistics(whole(ground.model), pool.examples, pool.collator)
    progress(0.5)
    after = row_statistics(open_adapter(whole(ground.model), site.run.adapter), pool.examples, pool.collator)
    tokenizer = ground.kit.tokenizer()
    texts = [str(tokenizer.decode(example["input_ids"])) for example in pool.examples]
    rows = pool.rows
    scores = {name: values.tolist() for name, values in scores_of(after, before, texts).items()}
    guesses = Guesses(scores=dict(enumerate(scores["base"])))
    truth = Truth(rows=rows)
    member = [row.dataset == "train" for row in rows]
    curves = {name: curve(values, member, range(len(rows)), seed=ground.seed) for name, values in scores.items()}
    figures = score(guesses, truth, "scores", seed=ground.seed)
    shuffled = score(guesses, shuffle(truth, ground.seed), "scores", seed=ground.seed)
    return Outcome(
        attack=NAME,
        title="was this row tuned on, told from the loss before and after",
        source="Carlini and others 2021, section 5.2: the base model as reference",
        finds="scores",
        weak_point=(
            "no shadow models were trained (--attack lira does); members are rows of --train and others of --eval: "
            "where those are no random halves of one corpus, topics are told apart, and the figure is too high"
        ),
        knowledge=_KNOWLEDGE,
        traffic="as it crossed",
        domain="none",
        records=len(rows),
        sends=len(rows),
        figures=figures,
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
        notes={f"AUC by {name}": each.auc.value for name, each in curves.items() if each is not None},
        negative=check_negative(NAME, _KNOWLEDGE, shuffled),
    )


def whole(model: Path | None) -> Any:
    """The whole model as it was before tuning, float32."""
    with quiet_library():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()


EXAMINATION = Examination(
    name=NAME, knowledge=_KNOWLEDGE, default=True, needs_traffic=False, why_not=no_members, run=_attack
)
