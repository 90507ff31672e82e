"""``splitfl bench offsite``: offsite tuning beside the full model, full fine-tuning and the split, on the same rows.

Read from top to bottom. What is compared is made by the commands that people use: `splitfl kit`, `splitfl emulator`,
`splitfl serve` and `splitfl plugin` as processes, `splitfl tune` as the same function in a worker process, one training
after the other. Nothing here computes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.bench.children import Child, run_to_end
from splitfl.bench.offsite_cases import (
    FULL_TUNED,
    OFFSITE,
    QUICK_ROWS,
    RANK,
    SPLIT,
    Cell,
    plan_cells,
    steps_of,
)
from splitfl.bench.offsite_costs import measure_costs
from splitfl.bench.offsite_figures import Outcomes
from splitfl.bench.offsite_ground import Ground, folder_size, make_ground, served
from splitfl.bench.offsite_rows import Model, Place, RowFiles, find_models, find_tasks, write_public_text, write_rows
from splitfl.bench.offsite_summary import ON_EMULATOR, cost_case
from splitfl.bench.offsite_table import print_tables
from splitfl.bench.utility_course import UtilityCourse
from splitfl.bench.utility_orders import TrainCell, Trained, UtilityReady
from splitfl.config import BenchSettings, TuneSettings
from splitfl.errors import ResourceError, SplitflError, UsageError, printable
from splitfl.options import to_toml
from splitfl.report import as_duration
from splitfl.wire.keys import AllowList, new_keys

_EVAL_BATCH = 32
_TRAINING_LIMIT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the whole command shares."""

    settings: BenchSettings
    outcomes: Outcomes
    work: Path
    worker: Child
    rows: Mapping[str, RowFiles]
    """By task."""
    text: Path
    course: UtilityCourse


def bench_offsite(settings: BenchSettings) -> None:
    """Do every training that the settings ask for, measure speed and memory, and print the comparison.

    Raises:
        UsageError: a model or task that there is not, or a trunk with no layers to keep.
        ResourceError: trainings that failed; the others' figures are kept.
    """
    models = find_models(settings.model, settings.keep)
    places, missing = find_tasks(settings.tasks)
    outcomes = Outcomes.resumed(settings) if settings.resume else Outcomes(settings=settings)
    tasks = [place.task for place in places]
    left = {model.name: [c for c in plan_cells(settings, model.name, tasks) if not outcomes.has(c)] for model in models}
    count = sum(map(len, left.values()))
    with tempfile.TemporaryDirectory(prefix="splitfl-offsite-") as temporary, ExitStack() as stack:
        course = stack.enter_context(UtilityCourse(count, "bench offsite"))
        for sentence in missing:
            course.say(sentence)
        try:
            if count or any(not _has_costs(outcomes, model) for model in models):
                bench = stack.enter_context(_opened(settings, outcomes, places, Path(temporary), course))
                for model in models:
                    _bench_model(bench, model, places, left[model.name])
        finally:
            course.close()
            print_tables(outcomes)
    if outcomes.failed:
        first = next(iter(outcomes.failed.items()))
        raise ResourceError(
            f"{len(outcomes.failed)} trainings failed; the first was {first[0]}: {first[1]}",
            hint="mend what it says, and run the command again with --resume",
        )


@contextmanager
def _opened(
    settings: BenchSettings, outcomes: Outcomes, places: Sequence[Place], work: Path, course: UtilityCourse
) -> Iterator[Bench]:
    """The worker, keys and files of rows, for as long as the block lasts."""
    with Child("worker", ["party.utility_side"], threads=1, log=work / "worker.log") as worker:
        text, shipped = write_public_text(work, quick=settings.quick)
        if shipped:
            course.say("The shared texts are not here: emulators are distilled on rows that come with splitfl.")
        rows = {p.task.name: write_rows(p, work, QUICK_ROWS if settings.quick else p.task.rows) for p in places}
        for place in places:
            _tell_task(outcomes, place, rows[place.task.name], settings)
        new_keys("owner", work / "keys")
        AllowList(work / "keys" / "parties").add(new_keys("worker", work / "keys")[0])
        worker.ready(UtilityReady)
        yield Bench(settings=settings, outcomes=outcomes, work=work, worker=worker, rows=rows, text=text, course=course)


def _tell_task(outcomes: Outcomes, place: Place, rows: RowFiles, settings: BenchSettings) -> None:
    facts = {
        "training rows": len(rows.train.read_text(encoding="utf-8").splitlines()),
        "held-out rows": len(rows.held_out.read_text(encoding="utf-8").splitlines()),
        "steps": steps_of(place.task, settings),
        "rows of a batch": place.task.batch,
        "rows come with splitfl": int(place.shipped),
    }
    outcomes.tell(place.task.name, facts)


def _has_costs(outcomes: Outcomes, model: Model) -> bool:
    return cost_case(model.name, ON_EMULATOR) in outcomes.told


def _bench_model(bench: Bench, model: Model, places: Sequence[Place], cells: Sequence[Cell]) -> None:
    """One kind of task after the other, since they share a kit and an emulator; then what training costs."""
    for kind in dict.fromkeys(place.task.kind for place in places):
        task = next(place.task for place in places if place.task.kind == kind)
        mine = [cell for cell in cells if cell.task.kind == kind]
        first = kind == places[0].task.kind and not _has_costs(bench.outcomes, model)
        if not mine and not first:
            continue
        bench.course.say(f"{model.name}: cutting the kit and making the emulator for {kind}")
        ground = make_ground(model, task, bench.settings, bench.text, bench.work)
        bench.outcomes.tell(ground.case, ground.facts)
        _run_cells(bench, ground, mine)
        if first:
            bench.course.say(f"{model.name}: measuring speed and memory")
            file = bench.work / "costs.toml"
            cell = Cell(model=model.name, task=task, training=OFFSITE, seed=0)
            to_toml(_tuning(bench, ground, bench.rows[task.name], cell, None), file)
            for case, facts in measure_costs(ground, file, bench.settings, bench.work).items():
                bench.outcomes.tell(case, facts)


def _run_cells(bench: Bench, ground: Ground, cells: Sequence[Cell]) -> None:
    with ExitStack() as stack:
        address = None
        if any(cell.training == SPLIT for cell in cells):
            address = stack.enter_context(served(ground, bench.settings, bench.work))
        for cell in cells:
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=bench.work))
            try:
                words = _run_cell(bench, ground, cell, folder, address)
            except SplitflError as error:
                bench.outcomes.failed[cell.name] = words = printable(" ".join(str(error).split()))
                if bench.worker.process.poll() is not None:
                    raise  # nobody is left to do the others
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            bench.course.done(cell.name, words)


def _run_cell(bench: Bench, ground: Ground, cell: Cell, folder: Path, address: str | None) -> str:
    """One training; the adapter of an offsite one is plugged in. What came out, in words."""
    rows = bench.rows[cell.task.name]
    told = _tuning(bench, ground, rows, cell, address, folder / "run")
    to_toml(told, folder / "tune.toml")
    whole = str(ground.model.path) if cell.training == FULL_TUNED else None
    trained = bench.worker.ask(TrainCell(settings=str(folder / "tune.toml"), whole=whole), Trained, _TRAINING_LIMIT_S)
    if trained.failed:
        raise ResourceError(trained.failed)
    figures = dict(trained.figures)
    if cell.rate is not None:
        bench.outcomes.note_trial(cell, figures)
        return f"validation loss {figures['held-out loss']:.3f} in {as_duration(figures['seconds'])}"
    figures["learning rate"] = told.learning_rate
    if cell.training == FULL_TUNED:  # one person holds everything: nothing crosses
        del figures["bytes sent"], figures["bytes received"]
    elif cell.training == SPLIT:
        figures["bytes received"] += ground.facts["kit"]
    plugged = None
    if cell.training == OFFSITE:
        figures["bytes received"] = ground.bytes_down
        figures["bytes sent"] = folder_size(told.out / "adapter")
        plugged = _plugged(bench, ground, told, folder)
    bench.outcomes.note(cell, figures, plugged)
    return _in_words(cell, figures, plugged)


def _in_words(cell: Cell, figures: Mapping[str, float], plugged: Mapping[str, float] | None) -> str:
    metric, time = cell.task.metric, as_duration(figures["seconds"])
    name, before, after = metric.removeprefix("held-out "), figures[f"{metric} before"], figures[metric]
    words = f"{name} {before:.3f} -> {after:.3f} in {time}"
    if plugged is None:
        return words
    return f"{words} on the emulator; {plugged[f'{metric} before']:.3f} -> {plugged[metric]:.3f} plugged in"


def _plugged(bench: Bench, ground: Ground, told: TuneSettings, folder: Path) -> dict[str, float]:
    """Figures of the full model on the held-out rows with the adapter, and ``... before`` without it."""
    assert told.eval is not None  # noqa: S101
    file = folder / "plugin.json"
    words = ["splitfl", "plugin", "--model", str(ground.model.path), "--kit", str(ground.kit), "--adapter",
             str(told.out / "adapter"), "--eval", str(told.eval), "--max-length", str(told.max_length), "--truncation",
             told.truncation, "--per-device-eval-batch-size", str(_EVAL_BATCH), "--threads", "1", "--device",
             bench.settings.device, "--json", str(file)]  # fmt: skip
    run_to_end(words, log=bench.work / "plugin.log", limit_s=_TRAINING_LIMIT_S)
    figures: dict[str, float] = {}
    for result in json.loads(file.read_text(encoding="utf-8"))["results"]:
        if result["case"] == "plug-in":
            figures[f"held-out {result['metric']}"] = result["value"]
            figures[f"held-out {result['metric']} before"] = result["reference"]
    return figures


def _tuning(
    bench: Bench, ground: Ground, rows: RowFiles, cell: Cell, address: str | None, out: Path | None = None
) -> TuneSettings:
    """What a person would give to `splitfl tune`."""
    settings, task, keys = bench.settings, cell.task, bench.work / "keys"
    trial = cell.rate is not None
    out = out or bench.work / "none"
    route: dict[str, Any] = {"protocol": "guarded-offline", "emulator": ground.emulator}
    if cell.training == SPLIT:
        if address is None:
            raise UsageError("A split training needs an owner.")
        secret = keys / "worker.key_secret"
        route = {"protocol": "split", "owner": address, "owner_key": keys / "owner.key", "key": secret}
    return TuneSettings(
        kit=ground.kit,
        train=rows.trial if trial else rows.train,
        eval=rows.validation if trial else rows.held_out,
        out=out,
        json=out.with_suffix(".json"),
        ledger=out.with_suffix(".sqlite"),
        dtype="float32",
        device=settings.device,
        threads=1,
        seed=cell.seed,
        max_length=task.max_length,
        truncation="right",
        max_steps=steps_of(task, settings),
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=_EVAL_BATCH,
        learning_rate=cell.rate or bench.outcomes.best_rate(cell.model, task, cell.training),
        warmup_steps=0.1,
        save_steps=10_000,
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=("all-linear",),
        **route,
    )
