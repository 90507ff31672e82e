"""``splitfl compare``: every cell of the grid, then table, page and advice. Read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace

import psutil
from rich.console import Console

from splitfl.bench.run import stopped_by_sigterm
from splitfl.bench.utility_course import UtilityCourse
from splitfl.compare.advise import advise, in_words, rules_of
from splitfl.compare.cells import Cell, plan_cells
from splitfl.compare.grid import SHIPPED, Grid, read_grid
from splitfl.compare.ground import Grounds
from splitfl.compare.places import find_places
from splitfl.compare.report import CSV, PAGE, json_results, write_csv, write_page
from splitfl.compare.result import BEFORE, SCORE, Outcome, done_cells, file_of, write_outcome
from splitfl.compare.run_cell import Bench, blank, run_cell
from splitfl.compare.summary import Row, summarise, verdict
from splitfl.compare.table import print_table
from splitfl.config_compare import CompareSettings
from splitfl.errors import ResourceError, SplitflError, UsageError, printable
from splitfl.metrics import write_results
from splitfl.report import as_duration


def compare(settings: CompareSettings) -> None:
    """Do every cell that the settings ask for, and show what came out.

    Raises:
        UsageError: a grid, a name or limits that are not understood; cells that are in the way.
        ResourceError: cells that failed; the others' figures are kept.
    """
    grid = read_grid(settings.grid or SHIPPED)
    rules = rules_of(settings)
    cells = plan_cells(grid, settings)
    if settings.plan:
        for cell in cells:
            print(cell.name)
        return
    digests = {cell.name: cell.digest(grid) for cell in cells}
    done = done_cells(cells, digests, settings.out)
    only_read = settings.any_limit and bool(done) and not settings.resume
    if not only_read:
        _refuse_what_is_there(cells, settings)
        with stopped_by_sigterm():
            done = _run_all(grid, settings, cells, digests, done if settings.resume else {})
    outcomes = [done[cell.name] for cell in cells if cell.name in done]
    rows = summarise(outcomes, grid)
    _show(grid, settings, outcomes, rows)
    if settings.any_limit:
        for data, advice in advise(rows, rules, settings.on).items():
            print("\n".join(in_words(data, advice)))
    _tell_failures(outcomes)


def _refuse_what_is_there(cells: Sequence[Cell], settings: CompareSettings) -> None:
    there = [cell for cell in cells if file_of(cell, settings.out).is_file()]
    if there and not settings.resume:
        raise UsageError(
            f"{settings.out} holds {len(there)} of these {len(cells)} cells already.",
            hint="add --resume to keep them and do the others, or choose another --out",
        )


def _show(grid: Grid, settings: CompareSettings, outcomes: Sequence[Outcome], rows: Sequence[Row]) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    print_table(rows, grid)
    console.print(verdict(rows, grid))
    write_csv(settings.out / CSV, outcomes, rows, grid)
    console.print(f"table: {settings.out / CSV}", markup=False)
    try:
        write_page(settings.out / PAGE, rows, grid, outcomes, quick=settings.quick)
        console.print(f"page: {settings.out / PAGE}", markup=False)
    except UsageError as error:  # the extra is not installed; the figures are complete without a page
        console.print(str(error), markup=False)
    if settings.json is not None:
        write_results(settings.json, "compare", settings, json_results(outcomes, rows))


def _tell_failures(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        raise ResourceError(
            f"{len(failed)} of {len(outcomes)} cells failed; the first was {failed[0].data}, {failed[0].design}, seed "
            f"{failed[0].seed}: {failed[0].failed}",
            hint="mend what it says, and run the command again with --resume",
        )


# ---- running


def _run_all(
    grid: Grid, settings: CompareSettings, cells: Sequence[Cell], digests: dict[str, str], done: dict[str, Outcome]
) -> dict[str, Outcome]:
    """What was done already, and every other cell that can be run here."""
    left = [cell for cell in cells if cell.name not in done]
    if not left:
        return done
    places, missing = find_places(grid, list(dict.fromkeys(cell.data for cell in cells)))
    left = [cell for cell in left if cell.data in places]
    grounds = Grounds(grid, places, settings.out.resolve())
    grounds.prepare_keys()
    bench = Bench(
        grid=grid, grounds=grounds, out=settings.out.resolve(), audit=settings.audit, keep=settings.keep,
        device=settings.device, quick=settings.quick,
    )  # fmt: skip
    with UtilityCourse(len(left), "compare") as course:
        for sentence in missing:
            course.say(sentence)
        course.say(f"{len(left)} cells, {settings.jobs} at a time; {len(done)} are there already")
        course.begin()

        def one(cell: Cell) -> Outcome:
            return _attempt(bench, cell)

        def keep(cell: Cell, outcome: Outcome) -> None:
            write_outcome(cell, digests[cell.name], outcome, settings.out)
            done[cell.name] = outcome
            course.done(cell.name, told(outcome))

        in_parallel(left, settings.jobs, one, keep)
    return done


def _attempt(bench: Bench, cell: Cell) -> Outcome:
    """A cell's result; a failure is one too, and stops no other cell."""
    try:
        return run_cell(bench, cell)
    except SplitflError as error:
        return replace(blank(cell), failed=printable(" ".join(str(error).split()), 400))


def in_parallel(
    cells: Sequence[Cell], jobs: int, one: Callable[[Cell], Outcome], keep: Callable[[Cell, Outcome], None]
) -> None:
    """Do `jobs` cells at a time, in order; `keep` is called in this thread after each.

    What is interrupted ends the cells that have not begun; those that have end with their processes.
    """
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="does a cell")
    futures = {pool.submit(one, cell): cell for cell in cells}
    try:
        for future in as_completed(futures):
            keep(futures[future], future.result())
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            _end_children()
            time.sleep(0.2)
        raise
    finally:
        pool.shutdown(wait=True)


def _end_children() -> None:
    """Tell every process that the cells have started to stop; each cell then ends with an error, and its folders."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.terminate()


def told(outcome: Outcome) -> str:
    """A cell's main figures, in one line."""
    if outcome.failed:
        return f"failed: {outcome.failed}"
    figures = outcome.figures
    before = f"{figures[BEFORE]:.3f} -> " if BEFORE in figures else ""
    words = [f"{outcome.metric} {before}{figures[SCORE]:.3f} in {as_duration(figures['seconds'])}"]
    holder = [attack for attack in outcome.attacks if attack.side == "holder"]
    if holder:
        best = max(holder, key=lambda attack: (attack.works, attack.advantage))
        words.append(f"best attack {best.name}: {best.metric} {best.value:.2f}, guessing {best.baseline:.2f}")
    elif outcome.not_attacked:
        words.append(outcome.not_attacked)
    return "; ".join(words)
