"""`splitfl audit`: attack what a run sent, score it against the rows behind it, and write the report card.

Every attack's result is on the disk as soon as it is there; the same command given again goes on from those files.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from party.audit_beyond import Examination, Site, examinations
from party.audit_controls import run_controls
from party.audit_ground import datasets_of, open_ground
from party.audit_jobs import Ground, Job, do, plan_jobs, why_not
from party.opening import say
from party.recorded import forget
from party.rundir import RunDirectory
from splitfl.audit.attack import Attack
from splitfl.audit.attacks import attacks
from splitfl.audit.card import Card, write_card
from splitfl.audit.controls import Control
from splitfl.audit.course import Course
from splitfl.audit.examined import Examined, examined_results, find_examined
from splitfl.audit.results import Outcome, Skipped, as_results, digest, find_outcome, keep
from splitfl.audit.view import Knowledge
from splitfl.config_audit import KNOWLEDGE, AuditSettings
from splitfl.errors import SplitflError, UsageError, nearest, printable
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
    chosen, beside = _chosen(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ground, off = open_ground(settings, say, traffic=bool(chosen) or any(each.needs_traffic for each in beside))
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    site = Site(ground=ground, run=RunDirectory(settings.run), settings=settings)
    jobs, others, skipped = _plan(chosen, beside, site)
    key = digest(
        [ground.sent[number] for number in sorted(ground.sent)],
        ground.choice, ground.effort, ground.seed, ground.domain, ground.auxiliary, ground.labelled, ground.model,
        settings.texts,
    )  # fmt: skip
    found = _Found(skipped=skipped)
    with Course(len(jobs) + len(others) + bool(jobs)) as course:
        try:
            for job in jobs:
                found.take(_one(job, ground, folder, key, course, texts=settings.texts))
            for other in others:
                found.take(_beside(other, site, folder, key, course), beside=True)
            if jobs:
                found.controls = run_controls(ground, found.on_traffic, chosen, folder, key, course)
            found.controls += [each.negative for each in found.beside if each.negative is not None]
            found.finished = True
        finally:
            if found.outcomes or found.examined or found.finished:
                _write(settings, ground, off, found)
    _tell(found, folder)


@dataclass(kw_only=True)
class _Found:
    """What came out so far."""

    skipped: list[Skipped]
    on_traffic: list[Outcome] = field(default_factory=list)
    beside: list[Outcome] = field(default_factory=list)
    """Scored like attacks on traffic, but of something else."""
    examined: list[Examined] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    finished: bool = False

    @property
    def outcomes(self) -> list[Outcome]:
        """All that have a score."""
        return [*self.on_traffic, *self.beside]

    def take(self, came: Outcome | Examined | Skipped, *, beside: bool = False) -> None:
        """Note a result."""
        match came:
            case Skipped():
                self.skipped.append(came)
            case Examined():
                self.examined.append(came)
            case Outcome():
                (self.beside if beside else self.on_traffic).append(came)


def _chosen(settings: AuditSettings) -> tuple[list[Attack], list[Examination]]:
    """Attacks on traffic, and examinations of other things."""
    on_traffic = {name: attack for name, attack in attacks().items() if "update" not in attack.needs}
    beside = examinations()
    known = {name.replace("_", "-"): name for name in (*on_traffic, *beside)}
    for name in settings.attack:
        if name.replace("_", "-") not in known:
            hint = nearest(name, list(known.values()))
            raise UsageError(f"There is no attack {printable(name, 40)!r}.", hint=hint)
    if settings.attack:
        names = [known[name.replace("_", "-")] for name in settings.attack]
        return [on_traffic[n] for n in names if n in on_traffic], [beside[n] for n in names if n in beside]
    return (
        [attack for attack in on_traffic.values() if attack.default],
        [each for each in beside.values() if each.default],
    )


def _plan(
    chosen: list[Attack], beside: list[Examination], site: Site
) -> tuple[list[Job], list[Examination], list[Skipped]]:
    settings, ground = site.settings, site.ground
    asked = tuple(Knowledge(KNOWLEDGE.index(name)) for name in settings.knowledge) or DEFAULT
    jobs, others, skipped = [], [], []
    for attack in chosen:
        for knowledge in sorted(asked):
            why = why_not(attack, knowledge, ground)
            if why is None:
                jobs += plan_jobs(attack, knowledge, ground)
            else:
                skipped.append(Skipped(attack=attack.name, knowledge=knowledge.short, why=why))
    for each in beside:
        why = each.why_not(site)
        if why is None:
            others.append(each)
        else:
            skipped.append(Skipped(attack=each.name, knowledge=each.knowledge, why=why))
    if not jobs and not others:
        raise UsageError(
            "No attack fits this run.",
            hint="; ".join(f"{each.attack} {each.knowledge}: {each.why}" for each in skipped[:3]),
        )
    if not settings.attack:
        left_out = [name for name, attack in attacks().items() if not attack.default]
        left_out += [name for name, each in examinations().items() if not each.default]
        why = "only when it is named with --attack"
        skipped += [Skipped(attack=name, knowledge="any", why=why) for name in left_out]
    return jobs, others, skipped


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


def _beside(
    examination: Examination, site: Site, folder: Path, key: str, course: Course
) -> Outcome | Examined | Skipped:
    """An examination of something else than traffic; kept like an attack."""
    course.begin(examination.name)
    path = folder / "results" / f"{examination.name}.json"
    key = f"{key} {site.settings.canaries}"
    found = find_examined(path, key) or find_outcome(path, key)
    came: Outcome | Examined | str
    if found is None:
        started = time.monotonic()
        try:
            came = examination.run(site, course.advance)
        except SplitflError as error:
            came = error.problem
        spent = time.monotonic() - started
    else:
        came, spent = found, found.cost.seconds
    if isinstance(came, str):
        course.end(f"left out: {came}")
        return Skipped(attack=examination.name, knowledge=examination.knowledge, why=came)
    if found is None:
        keep(path, key, came)
    words = came.found.rstrip(".") if isinstance(came, Examined) else f"{came.metric} {came.main}"
    before = ", from an earlier command" if found is not None else ""
    course.end(f"{words} in {as_duration(spent)}{before}", kept=found is not None)
    return came


# ---- the end


def _write(settings: AuditSettings, ground: Ground, off: float | None, found: _Found) -> None:
    tuned = RunDirectory(settings.run).settings()
    card = Card(
        run=settings.run,
        outcomes=tuple(found.outcomes),
        examined=tuple(found.examined),
        skipped=tuple(found.skipped),
        controls=tuple(found.controls),
        distance=off,
        asked=settings.records,
        quick=settings.quick,
        texts=settings.texts,
        kit=ground.kit,
        counts=dataclasses.asdict(ground.recorded.counts),
        ruled=any(each.ruled for each in ground.truth.marks.values()),
        with_model=ground.model is not None,
        finished=found.finished,
        datasets=datasets_of(tuned, ground.kit),
        ledger=tuned.ledger,
        reference=settings.reference,
    )
    write_card(settings.folder, card)
    if settings.json is not None:
        results = as_results(found.outcomes, found.controls) + examined_results(found.examined)
        write_results(settings.json, "audit", settings, results)


def _tell(found: _Found, folder: Path) -> None:
    for each in found.outcomes:
        print(f"{each.name:18} {each.traffic:16} {each.metric:16} {each.main}   {each.records} rows")
    for other in found.examined:
        print(f"{other.name:18} {other.found}")
    for control in found.controls:
        if not control.works:
            print(f"control, {control.name}: {control.attack} {control.knowledge} does not work: {control.found}")
    print(f"report {folder / 'audit.html'}")
