"""``splitfl bench utility``: what a design and its noise cost in utility, beside LoRA on the whole model in one piece.

One owner process a task (`splitfl serve`, with keys), and worker processes that do the runs one after the other. A run
is `splitfl tune` in all but the command line: the same function, sockets, ledger and files. Nothing here computes.
"""

from __future__ import annotations

import math
import queue
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitfl.bench.children import Child, Owner, run_to_end
from splitfl.bench.utility_cases import (
    QUICK_ROWS,
    REFERENCE,
    Cell,
    CutFacts,
    noise_figures,
    plan_cells,
    steps_of,
)
from splitfl.bench.utility_course import UtilityCourse
from splitfl.bench.utility_figures import Outcomes
from splitfl.bench.utility_orders import CutMeasured, MeasureCut, TrainCell, Trained, UtilityReady
from splitfl.bench.utility_rows import Place, find_tasks, write_rows
from splitfl.bench.utility_table import print_table
from splitfl.config import BenchSettings, TuneSettings
from splitfl.errors import ResourceError
from splitfl.options import to_toml
from splitfl.wire.keys import AllowList, new_keys

_MEASURED_ROWS = 64
_EVAL_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the runs of one task share."""

    place: Place
    train: Path
    held_out: Path
    kit: Path
    address: str


def bench_utility(settings: BenchSettings) -> None:
    """Do every run that the settings ask for, and print what each design keeps of the reference's gain.

    Raises:
        UsageError: a task, design or level that there is not, or that cannot be run here.
        ResourceError: runs that failed; the others' figures are kept.
    """
    places, missing = find_tasks(settings.tasks)
    cells = plan_cells(settings, [place.task for place in places])
    outcomes = Outcomes.resumed(settings) if settings.resume else Outcomes(settings=settings)
    left = [cell for cell in cells if cell.name not in outcomes.cells]
    needed = [place for place in places if any(cell.task is place.task for cell in left)]
    with tempfile.TemporaryDirectory(prefix="splitfl-utility-") as temporary, UtilityCourse(len(left)) as course:
        for sentence in missing:
            course.say(sentence)
        try:
            _run_all(settings, left, needed, Path(temporary), outcomes, course)
        finally:
            course.close()
            print_table(outcomes.cells)
    if outcomes.failed:
        first = next(iter(outcomes.failed.items()))
        raise ResourceError(
            f"{len(outcomes.failed)} of {len(cells)} runs failed; the first was {first[0]}: {first[1]}",
            hint="mend what it says, and run the command again with --resume",
        )


def _run_all(
    settings: BenchSettings, cells: Sequence[Cell], places: Sequence[Place], work: Path, outcomes: Outcomes,
    course: UtilityCourse,
) -> None:  # fmt: skip
    if not cells:
        return
    course.say("preparing kits, keys and processes")
    count = min(settings.workers, len(cells))
    prepare_keys(work / "keys", count)
    with ExitStack() as stack:
        workers = [stack.enter_context(open_worker(number, work)) for number in range(count)]
        grounds = {}
        for place in places:
            grounds[place.task.name] = stack.enter_context(open_ground(place, settings, work))
        for worker in workers:
            worker.ready(UtilityReady)
        for name, ground in grounds.items():
            facts, steps = measure(ground, settings, workers[0], work), steps_of(ground.place.task, settings)
            outcomes.note_facts(name, facts, steps, shipped=ground.place.shipped)
        course.begin()

        def one(number: int, cell: Cell) -> Trained:
            facts = outcomes.facts[cell.task.name]
            return do_run(cell, grounds[cell.task.name], facts, settings, workers[number], number, work)

        def done(cell: Cell, trained: Trained) -> None:
            noise = noise_figures(cell, outcomes.facts[cell.task.name], steps_of(cell.task, settings))
            outcomes.note(cell, trained, noise)
            course.end(cell, trained)

        in_parallel(cells, workers, one, done)


def in_parallel(
    cells: Sequence[Cell], workers: Sequence[Child], one: Callable[[int, Cell], Trained],
    done: Callable[[Cell, Trained], None],
) -> None:  # fmt: skip
    """Give every cell to a worker that is free, in order; ends the workers.

    Args:
        cells: what to do.
        workers: each does one cell at a time.
        one: does a cell with the worker of that number, in a thread.
        done: called in this thread after each.
    """
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(workers)):
        free.put(number)

    def task(cell: Cell) -> Trained:
        number = free.get()
        try:
            return one(number, cell)
        finally:
            free.put(number)

    pool = ThreadPoolExecutor(len(workers), thread_name_prefix="asks a worker")
    try:
        futures = {pool.submit(task, cell): cell for cell in cells}
        for future in as_completed(futures):
            done(futures[future], future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.end()  # whoever still waits for its answer is told that it has ended
        pool.shutdown(wait=True)


# ---- processes, kits and keys


def open_worker(number: int, work: Path) -> Child:
    """Start a worker; it loads its libraries meanwhile."""
    return Child(f"worker {number}", ["party.utility_side"], threads=1, log=work / f"worker-{number}.log")


def prepare_keys(folder: Path, workers: int) -> None:
    """A pair for the owners, one for each worker, and the owners' allow-list."""
    new_keys("owner", folder)
    for number in range(workers):
        public, _ = new_keys(f"worker-{number}", folder)
        AllowList(folder / "parties").add(public)


@contextmanager
def open_ground(place: Place, settings: BenchSettings, work: Path) -> Iterator[Ground]:
    """Write a task's rows, cut its kit, and serve its trunk for as long as the block lasts."""
    task = place.task
    train, held_out = write_rows(place, work, QUICK_ROWS if settings.quick else task.rows)
    kit, log = work / f"{task.name}-kit", work / f"{task.name}-owner.log"
    words = ["splitfl", "kit", str(kit), "--model", str(place.model), "--bottom", str(task.bottom), "--top",
             str(task.top), "--dtype", "float32", "--task", task.kind]  # fmt: skip
    if task.classes:
        words += ["--num-labels", str(task.classes)]
    run_to_end(words, log=log)
    serve = ["--model", str(place.model), "--kit", str(kit), "--bind", "tcp://127.0.0.1:0", "--dtype", "float32"]
    serve += ["--key", str(work / "keys" / "owner.key_secret"), "--parties", str(work / "keys" / "parties")]
    serve += ["--workers", str(settings.workers)]
    with Owner(serve, threads=1, log=log) as owner:
        yield Ground(place=place, train=train, held_out=held_out, kit=kit, address=owner.address())


# ---- runs


def measure(ground: Ground, settings: BenchSettings, worker: Child, work: Path) -> CutFacts:
    """Sizes at the cut of a task, from its training rows and the untuned bottom."""
    file = work / f"{ground.place.task.name}-measure.toml"
    to_toml(tune_settings(ground, settings, seed=0, number=0, out=work / "none", work=work), file)
    found = worker.ask(MeasureCut(settings=str(file), rows=_MEASURED_ROWS), CutMeasured)
    clip = found.norm * math.sqrt(found.median_length)
    return CutFacts(
        norm=found.norm,
        clip=clip,
        clipped=statistics.fmean(norm > clip for norm in found.row_norms),
        median_length=found.median_length,
        train_rows=found.train_rows,
        held_out_rows=found.held_out_rows,
        vocabulary=found.vocabulary,
    )


def tune_settings(
    ground: Ground, settings: BenchSettings, *, seed: int, number: int, out: Path, work: Path, protocol: str = "split",
    options: dict[str, object] | None = None,
) -> TuneSettings:  # fmt: skip
    """What a person would give to `splitfl tune` for one run; `number` is that of the worker, whose key is used."""
    task, keys = ground.place.task, work / "keys"
    given: dict[str, object] = dict(options or {})
    return TuneSettings(
        kit=ground.kit,
        owner=ground.address,
        owner_key=keys / "owner.key",
        key=keys / f"worker-{number}.key_secret",
        train=ground.train,
        eval=ground.held_out,
        out=out,
        json=out.with_suffix(".json"),
        ledger=out.with_suffix(".sqlite"),
        protocol=protocol,
        dtype="float32",
        threads=1,
        seed=seed,
        max_length=task.max_length,
        truncation="right",
        max_steps=steps_of(task, settings),
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=_EVAL_BATCH,
        learning_rate=task.learning_rate,
        warmup_steps=0.1,
        save_steps=10_000,
        target_modules=("all-linear",),
        **given,  # type: ignore[arg-type]
    )


def do_run(
    cell: Cell, ground: Ground, facts: CutFacts, settings: BenchSettings, worker: Child, number: int, work: Path
) -> Trained:
    """One run, by one worker; its files are removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=work))
    try:
        whole = cell.design == REFERENCE
        told = tune_settings(
            ground,
            settings,
            seed=cell.seed,
            number=number,
            out=folder / "run",
            work=work,
            protocol="split" if whole else cell.design,
            options=cell.level.options(facts.norm, facts.clip),
        )
        to_toml(told, folder / "tune.toml")
        model = str(ground.place.model) if whole else None
        return worker.ask(TrainCell(settings=str(folder / "tune.toml"), whole=model), Trained)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
