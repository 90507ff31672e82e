"""A cell of a federated protocol: a coordinator, its parties, and for `fed-split` an owner, all processes."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitfl.bench.children import START_LIMIT_S, Child, Owner
from splitfl.compare.cells import Cell
from splitfl.compare.ground import Ground
from splitfl.compare.result import (
    ANSWERED,
    OWNER_MEMORY,
    OWNER_S,
    PARTY_MEMORY,
    PARTY_S,
    TRIPS,
    Outcome,
)
from splitfl.compare.run_cell import (
    HANDED_KIT,
    HANDED_MODEL,
    RUN_LIMIT_S,
    Bench,
    audited,
    blank,
    evaluated,
    evaluation_batches,
    flops,
    keys_of,
    mean_of,
    of_party,
    open_owner,
    open_party,
    results_in,
    tune_settings,
    what_left,
    work_of,
)
from splitfl.compare.watch import Watch, wait_for
from splitfl.config import TuneSettings
from splitfl.config_distillation import KD_PROTOCOL, KD_RULE
from splitfl.config_federation import WHOLE_PROTOCOLS

_PATIENCE_S = 900.0


def run_federation(bench: Bench, cell: Cell, ground: Ground, folder: Path) -> Outcome:
    """All rounds, then the evaluation of the first party's adapter, which all have but for `fed-kd`."""
    assert cell.protocol is not None  # noqa: S101
    whole = cell.protocol.name in WHOLE_PROTOCOLS
    count = bench.grid.course.parties
    with ExitStack() as stack:
        owner = None if whole else stack.enter_context(open_owner(bench, ground, folder))
        address = None if owner is None else owner.address()
        coordinator = stack.enter_context(_coordinator(bench, cell, folder))
        _, federation, _ = coordinator.line(START_LIMIT_S).decode().split()
        told = [_settings(bench, cell, ground, folder, n, address, federation) for n in range(count)]
        around = [stack.enter_context(Watch(each)) for each in (owner, coordinator) if each is not None]
        with ExitStack() as inner:
            parties = [inner.enter_context(open_party(f"party {n}", each)) for n, each in enumerate(told)]
            watches = [
                inner.enter_context(Watch(party, each.out / "run.jsonl"))
                for party, each in zip(parties, told, strict=True)
            ]
            wait_for([*parties, coordinator], RUN_LIMIT_S)
        for watch in around:
            watch.sample()
        score = evaluated(bench, cell, ground, told[0].out, folder)
    handed = HANDED_MODEL if whole else HANDED_KIT
    figures = {
        **score, **mean_of([of_party(each.out, ground, handed) for each in told]),
        OWNER_S: sum(watch.seconds for watch in around), OWNER_MEMORY: float(max(watch.peak for watch in around)),
        PARTY_S: sum(watch.seconds for watch in watches) / count,
        PARTY_MEMORY: sum(watch.peak for watch in watches) / count,
        **_trips(told[0], owner, ground, folder, count),
        **flops(cell, ground, work_of(told[0].out, cell, ground.rows.counts["public"])),
    }  # fmt: skip
    outcome = replace(blank(cell), figures=figures, hands="model" if whole else "kit", **what_left(told[0].out))
    return audited(bench, ground, told[0].out, folder, outcome)


def _coordinator(bench: Bench, cell: Cell, folder: Path) -> Child:
    keys = bench.grounds.keys
    words = ["splitfl", "federate", "--bind", "tcp://127.0.0.1:0", "--key", str(keys / "coordinator.key_secret"),
             "--parties", str(keys / "parties"), "--state", str(folder / "state"), "--rounds",
             str(_rounds(cell)), "--min-parties", str(bench.grid.course.parties), "--deadline", str(_PATIENCE_S),
             "--stage-deadline", str(_PATIENCE_S), "--wait", "300"]  # fmt: skip
    for name, value in _agreed(cell).items():
        words += [f"--{name}", str(value)]
    return Child("coordinator", words, threads=1, log=folder / "coordinator.log", stop_with=signal.SIGTERM)


def _rounds(cell: Cell) -> int:
    assert cell.protocol is not None  # noqa: S101
    return min(cell.protocol.use.rounds, cell.steps)


def _agreed(cell: Cell) -> dict[str, Any]:
    """What coordinator and parties have to say alike."""
    assert cell.protocol is not None  # noqa: S101
    options = {**cell.protocol.options, **cell.mechanism.options}
    default = KD_RULE if cell.protocol.name == KD_PROTOCOL else "rolora"
    agreed: dict[str, Any] = {"rule": options.get("rule", default), "sum": options.get("sum", "mask")}
    named = {name.replace("_", "-"): options[name] for name in options if name.startswith("sum_")}
    return agreed | named


def _settings(
    bench: Bench, cell: Cell, ground: Ground, folder: Path, number: int, owner: str | None, federation: str
) -> TuneSettings:
    """What a person would give to `splitfl tune` for one party."""
    assert cell.protocol is not None  # noqa: S101
    keys = bench.grounds.keys
    agreed = _agreed(cell)
    route: dict[str, Any] = {
        "key": keys / f"party-{number}.key_secret", "federate": federation, "coordinator_key": keys / "coordinator.key",
        "protocol": cell.protocol.name, "train": ground.rows.shares[number], "rule": agreed["rule"],
        "sum": agreed["sum"], "local_steps": max(1, cell.steps // _rounds(cell)), "max_steps": -1,
        "timeout": _PATIENCE_S, "seed": cell.seed * 100 + number, "federation_seed": cell.seed,
    }  # fmt: skip
    if agreed["sum"] != "plain":
        route["peers"] = keys / "parties"
    if owner is None:
        route["model"] = ground.place.model
    else:
        route |= {"owner": owner, **keys_of(bench, number)}
    if cell.protocol.name == KD_PROTOCOL:
        route["public"] = ground.rows.public
    options = {**cell.protocol.options, **cell.mechanism.options}
    if any(name in options for name in ("dp_epsilon", "dp_noise_multiplier", "sum_noise")):
        route["dp_rounds"] = _rounds(cell)
    return tune_settings(bench, cell, ground, folder / f"party-{number}", **route)


def _trips(told: TuneSettings, owner: Owner | None, ground: Ground, folder: Path, count: int) -> dict[str, float]:
    """Round trips of one party in training: a sum is one, and each request to an owner."""
    rounds = float(results_in(told.out.with_suffix(".json"))["rounds"])
    if owner is None:
        return {TRIPS: rounds}
    found = results_in(folder / "owner.json")
    asked = found["forwards"] + found["backwards"] - evaluation_batches(ground)
    return {TRIPS: rounds + asked / count, ANSWERED: found["tokens"] / count}
