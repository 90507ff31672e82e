"""What the holder can take of the owner's trunk: a student trained on what came back (the owner's risk, not the rows').

A fifth of the recorded rows is kept apart, and says what the student is worth in the trunk's place: at a quarter of the
other rows and at all of them, beside no trunk at all (0 %) and the real one (100 %).
"""

from __future__ import annotations

import time

import torch

from party.audit_beyond import Examination, Progress, Site
from splitfl.audit.attacks.extract import Point, Recorded, Settings, extraction_curve
from splitfl.audit.examined import Examined, Fact
from splitfl.audit.results import Cost
from splitfl.audit.scoring import name_of
from splitfl.audit.top import open_top
from splitfl.audit.view import Knowledge, View
from splitfl.metrics import peak_rss_bytes

NAME = "extract"
_STEPS = {"quick": 30, "default": 120}
_FEWEST = 10
"""Rows."""
_APART = 5


def _why_not(site: Site) -> str | None:
    ground = site.ground
    if ground.kit.plan.task != "causal-lm":
        return "the model is a classifier"
    if not ground.causal:
        return "the bottom is not causal"
    if not ground.kit.plan.party_layers:
        return "the kit holds no layer that a student could begin as"
    if not any(each.output is not None for each in ground.sent.values()):
        return "no output of the trunk was recorded"
    return None if len(_rows(site)) >= _FEWEST else f"fewer than {_FEWEST} rows were recorded"


def _rows(site: Site) -> list[Recorded]:
    """One send of each row."""
    found = {}
    for number in site.ground.choice.whole:
        each, row = site.ground.sent.get(number), site.ground.recorded.truth.get(number)
        if each is None or each.output is None or row is None or not isinstance(row.labels, torch.Tensor):
            continue
        if len(row.labels) == len(each.hidden):
            found[name_of(row)] = Recorded(sent=each, labels=row.labels)
    return list(found.values())


def _examine(site: Site, progress: Progress) -> Examined | str:
    started = time.monotonic()
    ground = site.ground
    rows = _rows(site)
    apart = max(2, len(rows) // _APART)
    held, traffic = rows[:apart], rows[apart:]
    total = sum(len(row.labels) for row in traffic)
    folder = site.run.adapter if (site.run.adapter / "adapter_config.json").is_file() else None
    points = extraction_curve(
        ground.kit, traffic, held, (total // 4, total),
        Settings(steps=_STEPS[ground.effort], seed=ground.seed),
        top=open_top(View(kit=ground.kit, knowledge=Knowledge.EXACT, adapter=folder)),
        progress=progress,
    )  # fmt: skip
    if not points:
        return "no row fits a quarter of what was recorded"
    return _told(points, len(rows), time.monotonic() - started)


def _told(points: list[Point], rows: int, seconds: float) -> Examined:
    last = points[-1]
    facts = [
        Fact(
            name=f"share of the trunk's use recovered from {point.tokens:,} tokens", value=point.recovered, unit="share"
        )
        for point in points
    ]
    facts += [
        Fact(name="held-out loss with the student", value=last.student.loss, unit="nats", reference=last.true.loss,
             beside="with the real trunk"),
        Fact(name="held-out loss with no trunk at all", value=last.skipped.loss, unit="nats"),
        Fact(name="positions where the student's likeliest token is the real one", value=last.student.agreement,
             unit="share", reference=last.skipped.agreement, beside="without a trunk"),
    ]  # fmt: skip
    return Examined(
        name=NAME,
        title="a student of the owner's trunk, trained on what came back",
        source="model extraction by distillation, with derivatives (Czarnecki and others 2017)",
        adversary="the data holder: this is the owner's risk, not the rows'",
        found=(
            f"From {last.tokens:,} tokens of this run's traffic a student recovers {100 * last.recovered:.0f} % of "
            "what the trunk is worth on held-out rows."
        ),
        alarming=last.recovered > 0.5,
        weak_point="a longer training, more sessions, or an emulator to begin with take more",
        facts=tuple(facts),
        records=rows,
        cost=Cost(seconds=seconds, peak_rss_bytes=peak_rss_bytes()),
    )


EXAMINATION = Examination(name=NAME, knowledge="any", default=True, needs_traffic=True, why_not=_why_not, run=_examine)
