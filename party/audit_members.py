"""What the tuned adapter reveals: whether a row was among those that it was tuned on. Not of the traffic at all.

The attacker is whoever gets the adapter and has the whole model. Members are rows of ``--train``, others rows of
``--eval``: where these are no random halves of one corpus, the attack tells their topics apart and looks stronger.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from party.audit_jobs import Ground
from party.rundir import RunDirectory
from party.tune import read_data
from splitfl.adapters import open_adapter
from splitfl.audit.attacks.mia import row_statistics, scores_of
from splitfl.audit.controls import check_negative, shuffle
from splitfl.audit.results import Cost, Outcome, Skipped
from splitfl.audit.scoring import Truth, score
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Guesses
from splitfl.data import Example
from splitfl.load import quiet_library
from splitfl.metrics import peak_rss_bytes

NAME = "membership"
_MOST = 200
_KNOWLEDGE = "K3"


def why_not_members(ground: Ground, run: RunDirectory) -> Skipped | None:
    """Why it is left out; None if it is not."""
    tuned = run.settings()
    why = None
    if ground.kit.plan.task != "causal-lm":
        why = "the model is a classifier"
    elif ground.model is None:
        why = "the whole model was not given (--model)"
    elif not (run.adapter / "adapter_config.json").is_file():
        why = "the run has no adapter"
    elif tuned.eval is None:
        why = "no rows were held out"
    return None if why is None else Skipped(attack=NAME, knowledge=_KNOWLEDGE, why=why)


def attack_members(ground: Ground, run: RunDirectory, progress: Callable[[float], None]) -> Outcome:
    """Score members and others by how much the tuning lowered their loss (Carlini and others 2021, section 5.2)."""
    started = time.monotonic()
    data = read_data(run.settings(), ground.kit)
    held_out: list[Example] = list(data.held_out or ())
    count = min(_MOST, len(data.train), len(held_out))
    examples: list[Example] = [*list(data.train)[:count], *held_out[:count]]
    before = row_statistics(_whole(ground.model), examples, data.collator)
    progress(0.5)
    after = row_statistics(open_adapter(_whole(ground.model), run.adapter), examples, data.collator)
    tokenizer = ground.kit.tokenizer()
    texts = [str(tokenizer.decode(example["input_ids"])) for example in examples]
    rows = tuple(
        TrueRow(
            number=number, dataset="train" if number < count else "held-out", row=number % count,
            ids=torch.tensor(example["input_ids"]), labels=torch.tensor(example["labels"]),
            special=torch.zeros(len(example["input_ids"]), dtype=torch.bool),
        )
        for number, example in enumerate(examples)
    )  # fmt: skip
    scores = {name: values.tolist() for name, values in scores_of(after, before, texts).items()}
    guesses = Guesses(scores=dict(enumerate(scores["base"])))
    truth = Truth(rows=rows)
    figures = score(guesses, truth, "scores", seed=ground.seed)
    shuffled = score(guesses, shuffle(truth, ground.seed), "scores", seed=ground.seed)
    return Outcome(
        attack=NAME,
        title="was this row tuned on, told from the loss before and after",
        source="Carlini and others 2021, section 5.2: the base model as reference",
        finds="scores",
        weak_point="no shadow models were trained; likelihood-ratio attacks find more",
        knowledge=_KNOWLEDGE,
        traffic="as it crossed",
        domain="none",
        records=len(rows),
        sends=len(rows),
        figures=figures,
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
        negative=check_negative(NAME, _KNOWLEDGE, shuffled),
    )


def _whole(model: Path | None) -> Any:
    with quiet_library():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
