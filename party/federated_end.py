"""What a federation leaves at a party: adapters as PEFT directories, figures, and the words of its disclosure."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from party.evaluate import Score
from party.rounds import Outcome
from splitfl.adapters import ADAPTER_FILE
from splitfl.aggregation.rule import Rule
from splitfl.metrics import Result, peak_rss_bytes


def write_adapter(tensors: dict[str, torch.Tensor], config: LoraConfig, folder: Path, *, base_name: str) -> None:
    """Write an adapter as a PEFT directory; the old one is replaced whole or not at all."""
    staging = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        config.base_model_name_or_path, config.inference_mode = base_name, True
        config.save_pretrained(str(staging))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / ADAPTER_FILE)
        if folder.exists():
            shutil.rmtree(folder)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def disclosed(rule: Rule, summation: str, claim: str | None = None) -> dict[str, str]:
    """What a federation lets leave, in words; `claim` is the bound on it, where there is one."""
    sees = {
        "plain": "every update of this party, and so the state",
        "mask": "the sum of all updates, not one of them, unless all but one of the others work with it",
        "mask+hidden": "neither an update nor the sum, unless all but one of the others work with it",
        "bfv": "neither an update nor the sum; one party that works with it is enough to read every update",
        "ckks": "neither an update nor the sum; one party that works with it is enough to read every update",
    }[summation]
    others = "every update" if rule.needs_all else "the mean of all updates"
    return {
        "content": "values of the adapter (and a new head) that were tuned on the rows; scores on held-out rows",
        "how_often": "once a round; the same bytes again if a round begins anew",
        "coordinator_sees": sees,
        "other_parties_see": others,
        "bound": claim
        if claim is not None
        else f"none: {summation} hides updates from the coordinator, and bounds nothing of what the sum tells"
        if summation != "plain"
        else "none",
    }


def results_of(
    case: str, outcome: Outcome, before: Score | None, after: Score | None, sent: int, received: int, seconds: float
) -> list[Result]:
    """The figures of a run, for ``--json``."""
    one = partial(Result, case=case)
    results = [
        one(metric="rounds", value=outcome.rounds, unit="sums"),
        one(metric="best round", value=outcome.best_round, unit=""),
        one(metric="seconds", value=seconds, unit="s"),
        one(metric="bytes sent", value=sent, unit="bytes"),
        one(metric="bytes received", value=received, unit="bytes"),
        one(metric="peak memory", value=peak_rss_bytes(), unit="bytes"),
    ]
    if after is not None:
        then = before.facts() if before is not None else {}
        results += [
            one(metric=f"held-out {name}", value=value, unit="", reference=then.get(name))
            for name, value in after.facts().items()
            if name != "counted"
        ]
    return results
