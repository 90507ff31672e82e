"""``splitfl bench frameworks``: FedLLM, KD-FedLLM and Split-FedLLM on one data set, as the paper compares them.

For each design a coordinator, parties and (for `fed-split`) an owner run as processes of their own, through the
commands that people use, on the same rows, with the same model, steps, rounds and evaluator. What it costs a party is
counted where it arises: bytes on its sockets, processor time and memory of its process, operations of its own layers.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from splitfl.bench.children import ANSWER_LIMIT_S, START_LIMIT_S, Child, Owner, run_to_end
from splitfl.bench.frameworks_orders import CountFlops, Flops, Ready
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings, TuneSettings
from splitfl.config_distillation import KD_PROTOCOL, KD_RULE
from splitfl.demo import assets
from splitfl.errors import ResourceError, UsageError, nearest, printable
from splitfl.metrics import Result, read_run, write_results
from splitfl.options import to_toml
from splitfl.report import as_size
from splitfl.wire.keys import AllowList, new_keys

FRAMEWORKS = {"fed-params": "FedLLM", KD_PROTOCOL: "KD-FedLLM", "fed-split": "Split-FedLLM"}
LOSS, BEFORE, ACCURACY = "held-out loss", "held-out loss before", "held-out accuracy"
SENT, RECEIVED, CPU, FLOPS, MEMORY = "bytes sent", "bytes received", "client time", "client operations", "client memory"
_UNITS = {LOSS: "nats", BEFORE: "nats", ACCURACY: "share", SENT: "bytes", RECEIVED: "bytes", CPU: "s", FLOPS: "FLOP",
          MEMORY: "bytes"}  # fmt: skip
_SOURCES = ("hospital", "clinic")
_LENGTH, _BATCH, _RATE, _TOP_K = 96, 4, 2e-3, 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run."""

    parties: int
    rounds: int
    local_steps: int
    rows: int
    """Training rows of a party."""
    public: int
    held_out: int


def size_of(settings: BenchSettings) -> Size:
    """What the settings ask for."""
    quick = settings.quick
    return Size(
        parties=2 if quick else 3,
        rounds=settings.rounds or (1 if quick else 3),
        local_steps=settings.local_steps or (1 if quick else 4),
        rows=4 if quick else 48,
        public=4 if quick else 24,
        held_out=2 if quick else 12,
    )


def bench_frameworks(settings: BenchSettings) -> None:
    """Run the designs one after the other, and print what each gives and costs.

    Raises:
        UsageError: a design that there is not.
        ResourceError: a process failed; figures of the designs before are kept.
    """
    for name in settings.frameworks:
        if name not in FRAMEWORKS:
            raise UsageError(f"There is no framework {printable(name, 40)!r}.", hint=nearest(name, FRAMEWORKS))
    names, results = settings.frameworks or tuple(FRAMEWORKS), list[Result]()
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-frameworks-") as folder,
        UtilityCourse(len(names), "bench frameworks") as course,
    ):
        course.say("writing rows, keys and the kit")
        ground = Ground(Path(folder), size_of(settings))
        course.begin()
        try:
            for name in names:
                figures = ground.run(name)
                results += [Result(case=name, metric=m, value=v, unit=_UNITS[m]) for m, v in figures.items()]
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                course.done(name, f"loss {figures[BEFORE]:.3f} -> {figures[LOSS]:.3f}")
        finally:
            course.close()
            print_table(results)


class Ground:
    """Rows, keys, kit and model that all designs share.

    Args:
        folder: where everything of the benchmark goes.
        size: how much is run.
    """

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size, self.keys = folder, size, folder / "keys"
        self.names = [f"party-{number}" for number in range(size.parties)]
        for name in ("coordinator", "owner", *self.names):
            new_keys(name, self.keys)
        for name in self.names:
            AllowList(folder / "parties").add(self.keys / f"{name}.key")
        self._write_rows()
        self.model, self.kit = assets() / "model", folder / "kit"
        run_to_end(["splitfl", "kit", str(self.kit), "--model", str(self.model), "--dtype", "float32", "--no-verify"],
                   log=folder / "kit.log")  # fmt: skip

    def _write_rows(self) -> None:
        """Each party has rows of one source; held-out and public rows are of both, and public ones of no party."""
        size, data = self.size, assets() / "data"
        lines = {s: (data / f"{s}.train.jsonl").read_text(encoding="utf-8").splitlines() for s in _SOURCES}
        held = {s: (data / f"{s}.held.jsonl").read_text(encoding="utf-8").splitlines() for s in _SOURCES}
        for number, name in enumerate(self.names):
            start = number // 2 * size.rows
            self._write(name, lines[_SOURCES[number % 2]][start : start + size.rows])
        self._write("public", [line for s in _SOURCES for line in lines[s][-(size.public // 2) :]])
        self._write("held", [line for s in _SOURCES for line in held[s][: size.held_out // 2]])

    def _write(self, name: str, lines: list[str]) -> None:
        self._rows(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _rows(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    # ---- one design

    def run(self, protocol: str) -> dict[str, float]:
        """The figures of a design: means over its parties."""
        with contextlib.ExitStack() as stack:
            owner = stack.enter_context(self._owner()) if protocol == "fed-split" else None
            address = None if owner is None else owner.address()
            flops = self._flops(protocol, address)
            coordinator = stack.enter_context(self._coordinator(protocol))
            _, federation, _ = coordinator.line(START_LIMIT_S).decode().split()
            parties = [
                stack.enter_context(self._party(name, self._settings(protocol, name, address, federation)))
                for name in self.names
            ]
            for process in (*parties, coordinator):
                _wait(process)
            figures = [_of_party(self._out(protocol, name)) for name in self.names]
        return {
            **{metric: statistics.fmean(each[metric] for each in figures) for metric in figures[0]},
            FLOPS: float(flops),
        }

    def _owner(self) -> Owner:
        words = ["--model", str(self.model), "--kit", str(self.kit), "--bind", "tcp://127.0.0.1:0", "--dtype",
                 "float32", "--key", str(self.keys / "owner.key_secret"), "--parties",
                 str(self.folder / "parties")]  # fmt: skip
        return Owner(words, threads=1, log=self.folder / "owner.log")

    def _coordinator(self, protocol: str) -> Child:
        distils = protocol == KD_PROTOCOL
        words = ["splitfl", "federate", "--bind", "tcp://127.0.0.1:0", "--key",
                 str(self.keys / "coordinator.key_secret"), "--parties", str(self.folder / "parties"), "--state",
                 str(self.folder / f"{protocol}-state"), "--rounds", str(self.size.rounds), "--sum", "plain",
                 "--min-parties", str(self.size.parties), "--deadline", str(ANSWER_LIMIT_S), "--wait", "300",
                 *(["--rule", KD_RULE] if distils else [])]  # fmt: skip
        log = self.folder / f"{protocol}-coordinator.log"
        return Child("coordinator", words, threads=1, log=log, stop_with=signal.SIGTERM)

    def _party(self, name: str, settings: TuneSettings) -> Child:
        file = settings.out.with_suffix(".toml")
        to_toml(settings, file)
        words = ["splitfl", "tune", "--config", str(file)]
        return Child(name, words, threads=1, log=settings.out.with_suffix(".log"), stop_with=signal.SIGTERM)

    def _out(self, protocol: str, name: str) -> Path:
        return self.folder / f"{protocol}-{name}"

    def _settings(self, protocol: str, name: str, owner: str | None, federation: str) -> TuneSettings:
        """What a person would give to `splitfl tune`."""
        whole, distils = owner is None, protocol == KD_PROTOCOL
        out = self._out(protocol, name)
        given: dict[str, Any] = {"model": str(self.model)} if whole else {"owner": owner}
        if not whole:
            given["owner_key"] = self.keys / "owner.key"
        if distils:
            given |= {"public": self._rows("public"), "kd_top_k": _TOP_K, "rule": KD_RULE}
        return TuneSettings(
            kit=self.kit, out=out, protocol=protocol, key=self.keys / f"{name}.key_secret", federate=federation,
            coordinator_key=self.keys / "coordinator.key", train=self._rows(name), eval=self._rows("held"), sum="plain",
            ledger=out.with_suffix(".sqlite"), dtype="float32", threads=1, max_length=_LENGTH, truncation="right",
            local_steps=self.size.local_steps, per_device_train_batch_size=_BATCH, learning_rate=_RATE,
            target_modules=("all-linear",), timeout=ANSWER_LIMIT_S, **given,
        )  # fmt: skip

    def _flops(self, protocol: str, owner: str | None) -> int:
        """Operations of one party over all rounds: those of one step, times the steps."""
        settings = self._settings(protocol, self.names[0], owner, "tcp://127.0.0.1:9")
        file = self.folder / f"{protocol}-count.toml"
        out = self.folder / f"{protocol}-count"
        to_toml(_elsewhere(settings, out), file)
        log = self.folder / f"{protocol}-count.log"
        with Child("counting process", ["party.frameworks_side"], threads=1, log=log) as side:
            side.ready(Ready)
            found = side.ask(CountFlops(settings=str(file)), Flops)
        if found.failed:
            raise ResourceError(f"A step of {protocol} could not be counted: {found.failed}")
        lessons = found.lesson * found.batches
        return self.size.rounds * (self.size.local_steps * found.step + found.answers + lessons)


def _elsewhere(settings: TuneSettings, out: Path) -> TuneSettings:
    return replace(settings, out=out, ledger=out.with_suffix(".sqlite"))


def _wait(child: Child) -> None:
    """Until it ends by itself.

    Raises:
        ResourceError: it failed, or took too long.
    """
    try:
        code = child.process.wait(ANSWER_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise ResourceError(f"The {child.name} was not done within {ANSWER_LIMIT_S:.0f} s.") from None
    if code:
        raise ResourceError(f"The {child.name} ended with code {code}: {child.last_words()}")


def _of_party(out: Path) -> dict[str, float]:
    """What a party's own record says."""
    records = read_run(out / "run.jsonl")
    scores = {record["when"]: record for record in records if record["event"] == "eval"}
    start, end = (next(r for r in reversed(records) if r["event"] == event) for event in ("start", "end"))
    return {
        BEFORE: scores["before"]["loss"],
        LOSS: scores["after"]["loss"],
        ACCURACY: scores["after"]["accuracy"],
        SENT: end["bytes_sent"],
        RECEIVED: end["bytes_received"],
        CPU: end["cpu_seconds"] - start["cpu_seconds"],
        MEMORY: end["peak_rss_bytes"],
    }


def print_table(results: list[Result], *, console: Console | None = None) -> None:
    """One line a design; nothing where there is no figure."""
    if not results:
        return
    table = Table("framework", "protocol", *HEAD)
    for name, cells in table_rows([vars(result) for result in results]):
        table.add_row(FRAMEWORKS[name], name, *cells)
    (console or Console()).print(table)


HEAD = ("loss before", "loss", "accuracy", "sent", "received", "processor", "operations", "memory")


def table_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Name and cells of each design, under `HEAD`."""
    for name in FRAMEWORKS:
        found = {r["metric"]: r["value"] for r in results if r["case"] == name}
        if found:
            yield name, [
                f"{found[BEFORE]:.3f}", f"{found[LOSS]:.3f}", f"{found[ACCURACY]:.3f}", as_size(int(found[SENT])),
                as_size(int(found[RECEIVED])), f"{found[CPU]:.0f} s", f"{found[FLOPS] / 1e9:,.0f} GFLOP",
                as_size(int(found[MEMORY])),
            ]  # fmt: skip


def read_figures(file: Path) -> dict[str, Any]:
    """The record that ``--json`` wrote."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record
