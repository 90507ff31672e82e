"""What an owner would gain that answers with false gradients: a sandbox in this process, on the run's rows and cut."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from party.audit_beyond import Examination, Progress, Site
from party.audit_jobs import view_of
from party.hijack_sandbox import Batch, hijack_sandbox
from party.tune import read_data
from protocols import protocol_named
from splitfl.audit.examined import Examined, Fact
from splitfl.audit.results import Cost
from splitfl.audit.view import Knowledge
from splitfl.load import load_trunk_side, quiet_library
from splitfl.metrics import peak_rss_bytes

NAME = "hijack"
_STEPS = {"quick": 15, "default": 40}
_ROWS = {"quick": 8, "default": 24}
_BATCH = 4


def _why_not(site: Site) -> str | None:
    settings = site.run.settings()
    if site.ground.model is None:
        return "the whole model was not given (--model)"
    protocol = protocol_named(settings.protocol)
    if protocol.offline or not any(each.returned is not None for each in site.ground.sent.values()):
        return "no gradient of the owner reaches the bottom"
    if settings.freeze_bottom or not protocol.trains_bottom:
        return "the bottom is not trained, so false gradients move nothing"
    return None


def _examine(site: Site, progress: Progress) -> Examined:
    from model_owner.trunk import LocalLink, Trunk

    started = time.monotonic()
    ground, settings = site.ground, site.run.settings()
    with quiet_library():
        trunk = Trunk(load_trunk_side(Path(str(ground.model)), ground.kit.plan, dtype=torch.float32), ground.kit.plan)
    data = read_data(settings, ground.kit)
    rows = list(data.train)[: _ROWS[ground.effort]]
    batches: list[Batch] = [
        data.collator([{k: v for k, v in row.items() if k != "row"} for row in rows[at : at + _BATCH]])
        for at in range(0, len(rows), _BATCH)
    ]
    view = view_of(ground, Knowledge.BASE, (None, ()), (), defended=False, progress=lambda share: progress(share / 3))
    gain = hijack_sandbox(
        view, LocalLink(trunk), batches, steps=_STEPS[ground.effort], learning_rate=settings.learning_rate,
        seed=settings.seed,
    )  # fmt: skip
    caught = gain.caught_at is not None
    facts = [
        Fact(name="tokens read by the owner's inverter, honest gradients", value=gain.honest, unit="share",
             reference=gain.before, beside="before tuning"),
        Fact(name="the same, false gradients", value=gain.lying, unit="share", reference=gain.honest,
             beside="honest gradients"),
        Fact(name="the same, false gradients and a frozen bottom", value=gain.frozen, unit="share",
             reference=gain.honest, beside="honest gradients"),
    ]  # fmt: skip
    if gain.caught_at is not None:
        facts.append(Fact(name="backward at which the honesty check stops the run", value=gain.caught_at, unit="steps"))
    stopped = (
        f"the honesty check stops it at backward {gain.caught_at}" if caught else "the honesty check does not see it"
    )
    return Examined(
        name=NAME,
        title="what false gradients would gain from training the bottom",
        source="after feature-space hijacking (Pasquini, Ateniese and Bernaschi 2021)",
        adversary="an owner that lies in its backwards; played in this process, nothing is sent",
        found=(
            f"A lying owner's inverter reads {100 * gain.lying:.0f} % of the tokens, an honest one's "
            f"{100 * gain.honest:.0f} %; {stopped}."
        ),
        alarming=gain.lying > gain.honest + 0.01 and not caught,
        weak_point="one objective of many; a cleverer lie may stay below what the honesty check sees",
        facts=tuple(facts),
        records=len(rows),
        cost=Cost(seconds=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()),
    )


EXAMINATION = Examination(name=NAME, knowledge="K1", default=False, needs_traffic=True, why_not=_why_not, run=_examine)
