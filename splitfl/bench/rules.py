"""``splitfl bench rules``: every rule of combining adapters, on the same parties, rows, batches and first factors.

One worker process (`party/rules_side.py`) does the runs one after the other. A run is a whole federation in that
process, without a network: the rules are functions, and rounds over sockets are another matter. Nothing here computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from splitfl.bench.children import Child
from splitfl.bench.rules_cases import (
    ALL,
    BEFORE,
    SECONDS,
    TASKS,
    Cell,
    Setting,
    chosen_rate,
    count_runs,
    plan_settings,
    rates_on_first,
    rounds_of,
    seeds_of,
)
from splitfl.bench.rules_figures import Outcomes
from splitfl.bench.rules_orders import OpenTask, RuleRun, RulesReady, RunRule, TaskOpened
from splitfl.bench.rules_rows import Place, find_places, write_parties
from splitfl.bench.rules_table import print_tables
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.errors import ResourceError
from splitfl.report import as_duration

_LIMIT_S = 3600.0


def bench_rules(settings: BenchSettings) -> None:
    """Do every run that the settings ask for, and print the comparison.

    Raises:
        UsageError: a task or rule that there is not, or a task that cannot be run here.
        ResourceError: a rule of which every run of the first seed failed; the others' figures are kept.
    """
    places, missing = find_places(settings.tasks)
    planned = plan_settings(settings, [place.task.name for place in places])
    outcomes = Outcomes.resumed(settings) if settings.resume else Outcomes(settings=settings)
    left = count_runs(settings, planned) - _done(settings, planned, outcomes)
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-rules-") as temporary,
        UtilityCourse(left, "bench rules") as course,
    ):
        for sentence in missing:
            course.say(sentence)
        try:
            if left > 0:
                _run_all(settings, places, planned, outcomes, Path(temporary), course)
        finally:
            course.close()
            print_tables(outcomes.cells)
    without = [setting for setting in planned if chosen_rate(setting, seeds_of(settings)[0], outcomes.cells) is None]
    if without:
        why = next(iter(outcomes.reasons.values()), "in an earlier command")
        raise ResourceError(
            f"{len(without)} of {len(planned)} settings have no rate at which training works; the first is "
            f"{without[0].rule} on {without[0].task}: {why}",
            hint="give lower --rates, with another --json file",
        )


def _run_all(
    settings: BenchSettings, places: Sequence[Place], planned: Sequence[Setting], outcomes: Outcomes, work: Path,
    course: UtilityCourse,
) -> None:  # fmt: skip
    """Seed by seed, so that a table broken off compares all rules on the seeds that it has."""
    course.say("loading models and rows")
    with Child("worker", ["party.rules_side"], threads=1, log=work / "worker.log") as worker:
        worker.ready(RulesReady)
        for place in places:
            opened = worker.ask(_opening(place, settings, work), TaskOpened)
            outcomes.tell(place.task.name, opened, rounds_of(settings), shipped=place.shared is None)
        course.begin()
        for number, seed in enumerate(seeds_of(settings)):
            for setting in planned:
                for cell in cells_of(settings, setting, seed, outcomes, choosing=number == 0):
                    if cell.name not in outcomes.cells:
                        run = worker.ask(_order(cell, settings), RuleRun, _LIMIT_S)
                        outcomes.note(cell.name, run)
                        course.done(cell.name, _in_words(cell, run))


def cells_of(settings: BenchSettings, setting: Setting, seed: int, outcomes: Outcomes, *, choosing: bool) -> list[Cell]:
    """The runs of a setting on one seed: every rate on the first, if it chooses its own, else the rate chosen there."""
    if choosing and (rates := rates_on_first(settings, setting)):
        return [Cell(setting=setting, rate=rate, seed=seed) for rate in rates]
    rate = chosen_rate(setting, seeds_of(settings)[0], outcomes.cells)
    return [] if rate is None else [Cell(setting=setting, rate=rate, seed=seed)]


def _done(settings: BenchSettings, planned: Sequence[Setting], outcomes: Outcomes) -> int:
    return sum(
        cell.name in outcomes.cells
        for number, seed in enumerate(seeds_of(settings))
        for setting in planned
        for cell in cells_of(settings, setting, seed, outcomes, choosing=number == 0)
    )


def _opening(place: Place, settings: BenchSettings, work: Path) -> OpenTask:
    task = place.task.quick() if settings.quick else place.task
    return OpenTask(
        task=task.name,
        model=str(place.model),
        kind=task.kind,
        classes=task.classes,
        tuned_layers=task.tuned_layers,
        max_length=task.max_length,
        parties=write_parties(place, task, settings.parties, work),
    )


def _order(cell: Cell, settings: BenchSettings) -> RunRule:
    rounds, local_steps = rounds_of(settings)
    return RunRule(
        task=cell.setting.task,
        rule=cell.setting.rule,
        ranks=cell.setting.rank_of(settings.parties),
        rate=cell.rate,
        seed=cell.seed,
        rounds=rounds,
        local_steps=local_steps,
        batch=TASKS[cell.setting.task].batch,
        head_rate=TASKS[cell.setting.task].head_rate,
    )


def _in_words(cell: Cell, run: RuleRun) -> str:
    """The main figure of a run, in one line."""
    if run.failed:
        return f"failed: {run.failed}"
    metric, figures = TASKS[cell.setting.task].metric, run.figures
    return f"{metric} {figures[BEFORE]:.3f} -> {figures[ALL]:.3f} in {as_duration(figures[SECONDS])}"
