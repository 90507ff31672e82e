"""`splitfl audit`: attack what a run sent, score it against the rows behind it, and write the report card.

Every attack's result is on the disk as soon as it is there; the same command given again goes on from those files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from party.audit_controls import run_controls
from party.audit_ground import datasets_of, open_ground
from party.audit_jobs import Ground, Job, do, plan_jobs, why_not
from party.audit_members import NAME as MEMBERSHIP
from party.audit_members import attack_members, why_not_members
from party.opening import say
from party.recorded import forget
from party.rundir import RunDirectory
from splitfl.audit.attack import Attack
from splitfl.audit.attacks import attacks
from splitfl.audit.card import Card, write_card
from splitfl.audit.controls import Control
from splitfl.audit.course import Course
from splitfl.audit.results import Outcome, Skipped, as_results, digest, find_outcome, keep
from splitfl.audit.view import Knowledge
from splitfl.config_audit import KNOWLEDGE, AuditSettings
from splitfl.errors import UsageError, nearest, printable
from splitfl.metrics import write_results
from splitfl.report import as_duration, as_size

DEFAULT = (Knowledge.BASE, Knowledge.EXACT)


def audit(settings: AuditSettings) -> None:
    """Run the attacks and write the report.

    Raises:
        UsageError: no such attack, or the run holds no recording.
        DataError: the run was defended and its undefended twin cannot be made.
    """
    if settings.forget:
        say(f"forgotten: {as_size(forget(RunDirectory(settings.run)))} removed; what was recorded cannot be read again")
        return
    chosen = _chosen(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ground, off = open_ground(settings, say)
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jobs, skipped = _plan(settings, chosen, ground)
    key = digest(
        [ground.sent[number] for number in sorted(ground.sent)],
        ground.choice, ground.effort, ground.seed, ground.domain, ground.auxiliary, ground.labelled, ground.model,
        settings.texts,
    )  # fmt: skip
    outcomes: list[Outcome] = []
    controls: list[Control] = []
    finished = False
    members = _members(settings, ground, skipped)
    with Course(len(jobs) + members + 1) as course:
        try:
            for job in jobs:
                outcome = _one(job, ground, folder, key, course, texts=settings.texts)
                if isinstance(outcome, Outcome):
                    outcomes.append(outcome)
                else:
                    skipped.append(outcome)
            if members:
                outcomes.append(_members_attacked(settings, ground, folder, key, course))
            controls = run_controls(ground, outcomes, chosen, folder, key, course)
            finished = True
        finally:
            if outcomes:
                _write(settings, ground, off, outcomes, skipped, controls, finished=finished)
    _tell(outcomes, controls, folder)


def _chosen(settings: AuditSettings) -> list[Attack]:
    known = attacks()
    alike = {name.replace("_", "-"): attack for name, attack in known.items()}
    named = [name for name in settings.attack if name != MEMBERSHIP]
    for name in named:
        if name.replace("_", "-") not in alike:
            raise UsageError(f"There is no attack {printable(name, 40)!r}.", hint=nearest(name, [*known, MEMBERSHIP]))
    if settings.attack:
        return [alike[name.replace("_", "-")] for name in named]
    return [attack for attack in known.values() if attack.default]


def _plan(settings: AuditSettings, chosen: list[Attack], ground: Ground) -> tuple[list[Job], list[Skipped]]:
    asked = tuple(Knowledge(KNOWLEDGE.index(name)) for name in settings.knowledge) or DEFAULT
    jobs, skipped = [], []
    for attack in chosen:
        for knowledge in sorted(asked):
            why = why_not(attack, knowledge, ground)
            if why is None:
                jobs += plan_jobs(attack, knowledge, ground)
            else:
                skipped.append(Skipped(attack=attack.name, knowledge=knowledge.short, why=why))
    if not jobs and MEMBERSHIP not in settings.attack:
        raise UsageError(
            "No attack fits this run.",
            hint="; ".join(f"{each.attack} {each.knowledge}: {each.why}" for each in skipped[:3]),
        )
    if not settings.attack:
        skipped += [
            Skipped(attack=name, knowledge="any", why="only when it is named with --attack")
            for name, attack in attacks().items()
            if not attack.default
        ]
    return jobs, skipped


def _one(job: Job, ground: Ground, folder: Path, key: str, course: Course, *, texts: bool) -> Outcome | Skipped:
    course.begin(job.name)
    path = folder / "results" / f"{job.name.replace(',', '').replace(' ', '-')}.json"
    outcome = find_outcome(path, key)
    kept = outcome is not None
    if outcome is None:
        done = do(job, ground, progress=course.advance, texts=texts)
        if isinstance(done, str):
            course.end(f"left out: {done}")
            return Skipped(attack=job.attack.name, knowledge=job.knowledge.short, why=done)
        outcome = done
        keep(path, key, outcome)
    rate = f", {outcome.sends / outcome.cost.seconds:.1f} rows/s" if outcome.cost.seconds else ""
    before = ", from an earlier command" if kept else rate
    course.end(f"{outcome.metric} {outcome.main} in {as_duration(outcome.cost.seconds)}{before}", kept=kept)
    return outcome


def _members(settings: AuditSettings, ground: Ground, skipped: list[Skipped]) -> bool:
    """Whether the adapter is attacked as well; where it cannot be, `skipped` says why."""
    if settings.attack and MEMBERSHIP not in settings.attack:
        return False
    why = why_not_members(ground, RunDirectory(settings.run))
    if why is not None:
        skipped.append(why)
    return why is None


def _members_attacked(settings: AuditSettings, ground: Ground, folder: Path, key: str, course: Course) -> Outcome:
    course.begin(MEMBERSHIP)
    path = folder / "results" / f"{MEMBERSHIP}.json"
    found = find_outcome(path, key)
    outcome = found or attack_members(ground, RunDirectory(settings.run), course.advance)
    if found is None:
        keep(path, key, outcome)
    course.end(f"{outcome.metric} {outcome.main} in {as_duration(outcome.cost.seconds)}", kept=found is not None)
    return outcome


# ---- the end


def _write(
    settings: AuditSettings, ground: Ground, off: float | None, outcomes: list[Outcome], skipped: list[Skipped],
    controls: list[Control], *, finished: bool,
) -> None:  # fmt: skip
    tuned = RunDirectory(settings.run).settings()
    card = Card(
        run=settings.run,
        outcomes=tuple(outcomes),
        skipped=tuple(skipped),
        controls=tuple(controls),
        distance=off,
        asked=settings.records,
        quick=settings.quick,
        texts=settings.texts,
        kit=ground.kit,
        counts=dataclasses.asdict(ground.recorded.counts),
        ruled=any(each.ruled for each in ground.truth.marks.values()),
        with_model=ground.model is not None,
        finished=finished,
        datasets=datasets_of(tuned, ground.kit),
        ledger=tuned.ledger,
    )
    write_card(settings.folder, card)
    if settings.json is not None:
        write_results(settings.json, "audit", settings, as_results(outcomes, controls))


def _tell(outcomes: list[Outcome], controls: list[Control], folder: Path) -> None:
    for each in outcomes:
        print(f"{each.name:18} {each.traffic:16} {each.metric:16} {each.main}   {each.records} rows")
    for control in controls:
        if not control.works:
            print(f"control, {control.name}: {control.attack} {control.knowledge} does not work: {control.found}")
    print(f"report {folder / 'audit.html'}")
