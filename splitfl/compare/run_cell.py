"""One cell: a real run with its owner or coordinator in processes of their own, an evaluation, and an audit."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitfl.bench.children import Child, Owner, run_to_end
from splitfl.bench.offsite_ground import folder_size
from splitfl.bench.utility_orders import TrainCell, Trained, UtilityReady
from splitfl.compare.cells import REFERENCE, Cell
from splitfl.compare.flops import Work, operations, read_shapes
from splitfl.compare.grid import Grid
from splitfl.compare.ground import Ground, Grounds
from splitfl.compare.result import (
    ANSWERED,
    BEFORE,
    GIVEN,
    HANDED,
    MARGIN,
    OWNER_FLOP,
    OWNER_MEMORY,
    OWNER_S,
    PARTIES,
    PARTY_FLOP,
    PARTY_MEMORY,
    PARTY_S,
    RECEIVED,
    SCORE,
    SENT,
    TRIPS,
    WALL_S,
    Outcome,
)
from splitfl.compare.watch import Watch, wait_for
from splitfl.config import TuneSettings
from splitfl.errors import ResourceError
from splitfl.metrics import read_run
from splitfl.options import to_toml

RUN_LIMIT_S = 3600.0
EVAL_BATCH = 32
_RANK = 8
_OFFLINE = "guarded-offline"
_RECORDED = ("split", "guarded-online", "guarded-gradfree", "fed-split")  # activations cross: there is what to record


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells share."""

    grid: Grid
    grounds: Grounds
    out: Path
    audit: bool
    keep: bool
    device: str
    quick: bool


@contextmanager
def run_folder(bench: Bench, cell: Cell) -> Iterator[Path]:
    """An empty directory for a cell's run; removed afterwards unless it is to be kept."""
    folder = bench.out / "runs" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        if not bench.keep:
            shutil.rmtree(folder, ignore_errors=True)


def run_cell(bench: Bench, cell: Cell) -> Outcome:
    """Do the run; what it cost and was worth, what left, and what was recovered from it.

    Raises:
        SplitflError: a process failed; its last words.
    """
    from splitfl.compare.federation import run_federation  # it stands on this file

    started = time.monotonic()
    ground = bench.grounds.ground(cell)
    with run_folder(bench, cell) as folder:
        if cell.protocol is None:
            outcome = _reference(bench, cell, ground, folder)
        elif cell.protocol.federated:
            outcome = run_federation(bench, cell, ground, folder)
        elif cell.protocol.name == _OFFLINE:
            outcome = _offline(bench, cell, ground, folder)
        else:
            outcome = _online(bench, cell, ground, folder)
    parties = bench.grid.course.parties if cell.protocol is not None and cell.protocol.federated else 1
    figures = {**outcome.figures, PARTIES: float(parties), WALL_S: time.monotonic() - started}
    return replace(outcome, figures=figures, device=bench.device)


def blank(cell: Cell) -> Outcome:
    """A result without figures."""
    return Outcome(
        data=cell.data, cut=cell.cut, protocol=REFERENCE if cell.protocol is None else cell.protocol.name,
        mechanism=cell.mechanism.name, design=cell.design, seed=cell.seed, metric=cell.task.metric,
    )  # fmt: skip


# ---- settings


def tune_settings(bench: Bench, cell: Cell, ground: Ground, out: Path, **route: Any) -> TuneSettings:
    """What a person would give to `splitfl tune` for one run."""
    task, use = cell.task, None if cell.protocol is None else cell.protocol.use
    given = {} if cell.protocol is None else dict(cell.protocol.options)
    given |= cell.mechanism.options
    if given.get("noise") == "gauss":
        given.setdefault("clip", ground.measured["clip"])
        if cell.mechanism.size.ratio is not None:
            given["sigma"] = ground.measured["r"] / cell.mechanism.size.ratio
    if bench.audit and cell.protocol is not None and cell.protocol.name in _RECORDED:
        given["record"] = True
    fixed: dict[str, Any] = {
        "kit": ground.kit, "out": out, "json": out.with_suffix(".json"), "ledger": out.with_suffix(".sqlite"),
        "train": ground.rows.train, "dtype": "float32", "threads": 1, "seed": cell.seed, "device": bench.device,
        "max_length": task.max_length, "truncation": "right", "max_steps": cell.steps,
        "per_device_train_batch_size": task.batch, "per_device_eval_batch_size": EVAL_BATCH,
        "learning_rate": task.learning_rate * (1.0 if use is None else use.learning_rate_factor), "warmup_steps": 0.1,
        "save_steps": 10_000, "logging_steps": 1, "r": _RANK, "lora_alpha": 2 * _RANK,
        "target_modules": ("all-linear",), "protocol": "split" if cell.protocol is None else cell.protocol.name,
    }  # fmt: skip
    return TuneSettings(**{**fixed, **given, **route})


def keys_of(bench: Bench, party: int = 0) -> dict[str, Path]:
    """Key files that a party gives for its owner."""
    keys = bench.grounds.keys
    return {"owner_key": keys / "owner.key", "key": keys / f"party-{party}.key_secret"}


def open_owner(bench: Bench, ground: Ground, folder: Path) -> Owner:
    """A `splitfl serve` of this cell's own."""
    keys = bench.grounds.keys
    words = ["--model", str(ground.place.model), "--kit", str(ground.kit), "--bind", "tcp://127.0.0.1:0", "--dtype",
             "float32", "--key", str(keys / "owner.key_secret"), "--parties", str(keys / "parties"), "--json",
             str(folder / "owner.json"), "--device", bench.device]  # fmt: skip
    return Owner(words, threads=1, log=folder / "owner.log")


def open_party(name: str, settings: TuneSettings) -> Child:
    """A `splitfl tune` with these settings."""
    file = settings.out.with_suffix(".toml")
    to_toml(settings, file)
    words = ["splitfl", "tune", "--config", str(file)]
    return Child(name, words, threads=1, log=settings.out.with_suffix(".log"), stop_with=signal.SIGTERM)


# ---- the reference


def _reference(bench: Bench, cell: Cell, ground: Ground, folder: Path) -> Outcome:
    """LoRA on every layer of the whole model, by somebody who holds everything; nothing leaves."""
    route = {"owner": "tcp://127.0.0.1:9", "insecure_loopback": True, "eval": ground.rows.held_out}
    to_toml(tune_settings(bench, cell, ground, folder / "run", **route), folder / "reference.toml")
    with Child("reference", ["party.utility_side"], threads=1, log=folder / "reference.log") as side:
        side.ready(UtilityReady)
        with Watch(side) as watch:
            order = TrainCell(settings=str(folder / "reference.toml"), whole=str(ground.place.model))
            trained = side.ask(order, Trained, RUN_LIMIT_S)
            watch.sample()
    if trained.failed:
        raise ResourceError(trained.failed)
    found, metric = trained.figures, f"held-out {cell.task.metric}"
    length = ground.measured["tokens of a median row"]
    work = Work(trained=cell.steps * cell.task.batch * length, length=length, rank=_RANK)
    figures = {
        SCORE: found[metric], BEFORE: found[f"{metric} before"], SENT: 0.0, RECEIVED: 0.0,
        HANDED: float(ground.sizes["model"]), PARTY_S: watch.seconds, OWNER_S: 0.0, PARTY_MEMORY: float(watch.peak),
        TRIPS: 0.0, **flops(cell, ground, work),
    }  # fmt: skip
    return replace(blank(cell), figures=figures, hands="model", not_attacked="nothing leaves")


def flops(cell: Cell, ground: Ground, work: Work) -> dict[str, float]:
    """Operations of one party and of the owner."""
    shapes = read_shapes(ground.place.model, classifies=bool(cell.task.classes))
    name = None if cell.protocol is None else cell.protocol.name
    party, owner = operations(shapes, name, cell.bottom, cell.top, cell.task.keep, work)
    return {PARTY_FLOP: party, OWNER_FLOP: owner}


# ---- with an owner


def _online(bench: Bench, cell: Cell, ground: Ground, folder: Path) -> Outcome:
    """`split`, `guarded-online` and `guarded-gradfree`."""
    with ExitStack() as stack:
        owner = stack.enter_context(open_owner(bench, ground, folder))
        address = owner.address()
        told = tune_settings(bench, cell, ground, folder / "run", owner=address, **keys_of(bench))
        at_owner = stack.enter_context(Watch(owner))
        with open_party("party", told) as party, Watch(party, told.out / "run.jsonl") as at_party:
            wait_for([party], RUN_LIMIT_S)
        at_owner.sample()
        owner_figures = {OWNER_S: at_owner.seconds, OWNER_MEMORY: float(at_owner.peak)}
        score = evaluated(bench, cell, ground, told.out, folder)
    figures = {
        **score, **owner_figures, **_of_owner(folder / "owner.json", evaluation_batches(ground)),
        **of_party(told.out, ground, HANDED_KIT), PARTY_S: at_party.seconds, PARTY_MEMORY: float(at_party.peak),
        **flops(cell, ground, work_of(told.out, cell)),
    }  # fmt: skip
    outcome = replace(blank(cell), figures=figures, hands="kit", **what_left(told.out))
    return audited(bench, ground, told.out, folder, outcome)


def _of_owner(file: Path, evaluation: int) -> dict[str, float]:
    """Round trips of training; those of the evaluation come after it and are taken off."""
    found = results_in(file)
    trips = found["forwards"] + found["backwards"] - evaluation
    return {TRIPS: trips, ANSWERED: found["tokens"]}


def evaluation_batches(ground: Ground) -> int:
    """Requests that one evaluation makes."""
    return -(-ground.rows.counts["held-out"] // EVAL_BATCH)


def evaluated(
    bench: Bench, cell: Cell, ground: Ground, run: Path, folder: Path, *, split: str = "tuned"
) -> dict[str, float]:
    """What `splitfl evaluate` says of a run on the held-out rows, which no training has looked at."""
    file = folder / f"evaluate-{split}.json"
    words = ["splitfl", "evaluate", "--run", str(run), "--eval", str(ground.rows.held_out), "--split", split, "--json",
             str(file), "--per-device-eval-batch-size", str(EVAL_BATCH), "--threads", "1", "--device",
             bench.device]  # fmt: skip
    run_to_end(words, log=folder / "evaluate.log", limit_s=RUN_LIMIT_S)
    return {SCORE: results_in(file)[cell.task.metric]}


HANDED_KIT, HANDED_EMULATOR, HANDED_MODEL = ("kit",), ("kit", "emulator"), ("model",)


def of_party(run: Path, ground: Ground, handed: tuple[str, ...]) -> dict[str, float]:
    """Bytes of a party, from its own figures."""
    found = results_in(run.with_suffix(".json"))
    before = float(sum(ground.sizes[name] for name in handed))
    return {SENT: found["bytes sent"], RECEIVED: found["bytes received"], HANDED: before}


def work_of(run: Path, cell: Cell, public_rows: int = 0) -> Work:
    """What passed through the model in a run, from its record."""
    records = read_run(run / "run.jsonl")
    start = next(record for record in records if record["event"] == "start")
    length = start["train_tokens"] / start["train_rows"]
    trained = sum(r["tokens"] for r in records if r["event"] in ("train", "distil"))
    protocol = cell.protocol
    passed = 0.0
    if protocol is not None and protocol.name == "guarded-gradfree":
        passed = start["train_tokens"]
    elif protocol is not None and protocol.name == "fed-kd":
        passed = protocol.use.rounds * public_rows * length
    return Work(trained=trained, passed=passed, length=length, rank=_RANK)


def what_left(run: Path) -> dict[str, Any]:
    """Which tensors may leave, how updates are summed, and what is proven, from the run's own disclosure."""
    told = json.loads((run / "disclosure.json").read_text(encoding="utf-8"))
    up = [c for c in told["crossings"] if c["direction"].startswith("party to") and c["tensor"]]
    sends = [t for t in dict.fromkeys(c["tensor"] for c in up) if t not in ("mask", "positions")]
    start = next((r for r in read_run(run / "run.jsonl") if r["event"] == "start"), {})
    bound = told.get("federation", {}).get("bound") or start.get("claim", "")
    return {"sends": tuple(sends), "summed": str(start.get("sum", "")), "bound": str(bound)}


def results_in(file: Path) -> dict[str, Any]:
    """Metric to value of a ``--json`` file; of a metric that stands there twice, the first."""
    found: dict[str, Any] = {}
    for result in json.loads(file.read_text(encoding="utf-8"))["results"]:
        found.setdefault(result["metric"], result["value"])
    return found


# ---- on an emulator


def _offline(bench: Bench, cell: Cell, ground: Ground, folder: Path) -> Outcome:
    """`guarded-offline`: the holder tunes on the emulator, the owner plugs the adapter in and measures it."""
    emulator = bench.grounds.emulator(cell)
    told = tune_settings(bench, cell, ground, folder / "run", emulator=emulator)
    with open_party("party", told) as party, Watch(party, told.out / "run.jsonl") as at_party:
        wait_for([party], RUN_LIMIT_S)
    on_emulator = evaluated(bench, cell, ground, told.out, folder)[SCORE]
    plugged, at_owner = _plugged(bench, cell, ground, told.out, folder)
    sign = 1.0 if cell.task.higher_is_better else -1.0
    figures = {
        SCORE: plugged, MARGIN: 100 * sign * (plugged - on_emulator), GIVEN: _given(ground), **at_owner,
        PARTY_S: at_party.seconds, PARTY_MEMORY: float(at_party.peak), TRIPS: 1.0,
        SENT: float(folder_size(told.out / "adapter")), RECEIVED: 0.0,
        HANDED: float(sum(ground.sizes[name] for name in HANDED_EMULATOR)),
        **flops(cell, ground, work_of(told.out, cell)),
    }  # fmt: skip
    left = {**what_left(told.out), "sends": ("adapter",)}
    outcome = replace(blank(cell), figures=figures, hands="emulator", **left)
    return audited(bench, ground, told.out, folder, outcome)


def _given(ground: Ground) -> float:
    """Parameters of the trunk in the emulator, as a share of the trunk's."""
    file = ground.folder / "emulator.figures.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    one = next(result for result in results if result["metric"] == "parameters given")
    return float(one["value"] / one["reference"])


def _plugged(bench: Bench, cell: Cell, ground: Ground, run: Path, folder: Path) -> tuple[float, dict[str, float]]:
    """The score of the full model with the adapter, and what that took the owner."""
    file = folder / "plugin.json"
    words = ["splitfl", "plugin", "--model", str(ground.place.model), "--kit", str(ground.kit), "--adapter",
             str(run / "adapter"), "--eval", str(ground.rows.held_out), "--max-length", str(cell.task.max_length),
             "--truncation", "right", "--per-device-eval-batch-size", str(EVAL_BATCH), "--threads", "1", "--device",
             bench.device, "--json", str(file)]  # fmt: skip
    with (
        Child("plug-in", words, threads=1, log=folder / "plugin.log", stop_with=signal.SIGTERM) as child,
        Watch(child) as watch,
    ):
        wait_for([child], RUN_LIMIT_S)
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    score = next(r["value"] for r in found if r["case"] == "plug-in" and r["metric"] == cell.task.metric)
    return float(score), {OWNER_S: watch.seconds, OWNER_MEMORY: float(watch.peak)}


# ---- the audit


def audited(bench: Bench, ground: Ground, run: Path, folder: Path, outcome: Outcome) -> Outcome:
    """The result with what attacks came to; where they could not be run, why."""
    from splitfl.compare.privacy import attack_run

    if not bench.audit:
        return replace(outcome, not_attacked="not asked for")
    rows = {"members": ground.rows.train, "others": ground.rows.held_out}
    options = audit_options(bench, ground)
    attacks, why = attack_run(run, ground.place.model, rows, outcome.sends, folder, options)
    return replace(outcome, attacks=tuple(attacks), not_attacked=why)


def audit_options(bench: Bench, ground: Ground) -> list[str]:
    """Options of `splitfl audit`: an owner of a language model has the whole of it."""
    course = bench.grid.course
    count, known, attacks = course.records, course.knowledge, course.attacks
    if bench.quick:
        count, known, attacks = course.quick_records, course.quick_knowledge, course.quick_attacks
    words = ["--quick", "--records", str(count), *(word for name in known for word in ("--knowledge", name))]
    words += [word for name in attacks for word in ("--attack", name)]
    return words if ground.classifies else [*words, "--model", str(ground.place.model)]


def mean_of(figures: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {name: statistics.fmean(each[name] for each in figures) for name in figures[0]}
