"""Membership with shadow models: offline LiRA (Carlini and others 2022, section VI).

The attacker has rows like those of the run, base weights and settings, and tunes adapters of its own on random halves
of members and others, as often through them as the run went through its rows. A row counts as a member where the run's
adapter is surer of it than shadows that never saw it. Of a run with DP-SGD the shadows are tuned without noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import get_scheduler

from party.audit_beyond import Examination, Progress, Site
from party.audit_beyond.members import Pool, no_members, pool_of, whole
from party.rundir import RunDirectory
from party.whole import whole_with_lora
from splitfl.adapters import open_adapter
from splitfl.audit.attacks.mia import SHADOWS, Bools, RowStatistics, membership, row_statistics, train_shadows
from splitfl.audit.examined import Examined, Fact
from splitfl.audit.results import Cost
from splitfl.data import Example
from splitfl.errors import InternalError
from splitfl.metrics import peak_rss_bytes, read_run

NAME = "lira"
_QUICK = 4
_QUICK_ROWS = 24
_SCORES = {"lira": "against shadow models", "base": "loss before less loss after", "loss": "loss alone"}


def _examine(site: Site, progress: Progress) -> Examined:
    started = time.monotonic()
    quick = site.ground.effort == "quick"
    pool = pool_of(site, _QUICK_ROWS) if quick else pool_of(site)
    number = _QUICK if quick else SHADOWS
    done = 0

    def train(chosen: Sequence[int]) -> Sequence[RowStatistics]:
        nonlocal done
        found = _tuned(site, pool, [pool.examples[at] for at in chosen], seed=site.ground.seed + done)
        done += 1
        progress(done / (number + 1))
        return found

    shadows = train_shadows(train, len(pool.examples), shadows=number, seed=site.ground.seed)
    base = row_statistics(whole(site.ground.model), pool.examples, pool.collator)
    attacked = open_adapter(whole(site.ground.model), site.run.adapter)
    tuned = row_statistics(attacked, pool.examples, pool.collator)
    tokenizer = site.ground.kit.tokenizer()
    texts = [str(tokenizer.decode(example["input_ids"])) for example in pool.examples]
    member = _members(pool)
    curves = membership(tuned, base, texts, member, shadows=shadows, seed=site.ground.seed)
    facts = [Fact.of(f"AUC, {words}", curves[name].auc, "AUC", 0.5, "a coin") for name, words in _SCORES.items()]
    facts += [
        Fact.of(f"members found at {rate:.1%} false alarms", each, "share", rate, "a coin")
        for rate, each in curves["lira"].tpr.items()
    ]
    auc = curves["lira"].auc
    return Examined(
        name=NAME,
        title=f"was this row tuned on, told with {number} shadow models",
        source="Carlini and others 2022, section VI (offline LiRA)",
        adversary="whoever gets the adapter, and has rows like these and time to train",
        found=(
            f"Members are told from others with an AUC of {auc} (a coin: 0.5)"
            + (", better than a coin." if auc.low > 0.5 else ", no better than a coin.")
        ),
        alarming=auc.low > 0.5,
        weak_point=(
            "more shadow models, and such as are trained with the row too (online LiRA), find more; members are rows "
            "of --train and others of --eval, which may differ by more than the tuning"
        ),
        facts=tuple(facts),
        records=len(pool.examples),
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
    )  # fmt: skip


def _members(pool: Pool) -> Bools:
    return np.arange(len(pool.examples)) < pool.count


def _tuned(site: Site, pool: Pool, rows: Sequence[Example], *, seed: int) -> list[RowStatistics]:
    """What an adapter tuned on `rows` says of the whole pool; the run's own settings, and as many passes."""
    settings, kit = site.run.settings(), site.ground.kit
    if site.ground.model is None:
        raise InternalError("Shadow models were to be trained without a model.")
    alone = settings.federate is not None and settings.model is not None
    model = whole_with_lora(settings, kit, Path(site.ground.model), None if alone else kit.plan).float().train()
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps = max(1, round(passes_of(site.run) * len(rows) / batch))
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler(str(settings.lr_scheduler_type), optimiser, num_warmup_steps=0, num_training_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < min(batch, len(rows)):
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        inputs = pool.collator([{k: v for k, v in rows[at].items() if k != "row"} for at in chosen])
        loss = model(**inputs, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, settings.max_grad_norm or float("inf"))
        optimiser.step()
        schedule.step()
    return row_statistics(model.eval(), pool.examples, pool.collator)


def passes_of(run: RunDirectory) -> float:
    """How often the run went through its rows."""
    records = read_run(run.log)
    rows = next((float(r["train_rows"]) for r in records if r["event"] == "start" and "train_rows" in r), 0.0)
    steps = [float(r["steps"]) for r in records if r["event"] == "end" and r.get("steps")]
    settings = run.settings()
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return steps[-1] * batch / rows if steps and rows else settings.num_train_epochs


EXAMINATION = Examination(
    name=NAME, knowledge="K3", default=False, needs_traffic=False, why_not=no_members, run=_examine
)
