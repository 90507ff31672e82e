"""The parties of `splitfl bench soak`: one that stays and is asked step by step, and one that is killed and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from splitfl.bench.children import Child
from splitfl.bench.served import Home, assets, resident
from splitfl.bench.soak_orders import SoakReady, SoakStart, Trained, TrainOne, WriteSome, Wrote
from splitfl.errors import SplitflError

CYCLE, NEW_TOKENS = 40, 12
RUN_STEPS, SAVE_STEPS = 12, 3
ANSWER_S, RUN_S = 400.0, 1200.0


@dataclass
class Score:
    """What one party has done so far, and what of it was wrong."""

    done: int = 0
    """Steps and generations, or runs."""
    compared: int = 0
    wrong: int = 0
    lost: int = 0
    kills: int = 0
    openings: int = 0
    longest_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def failed(self, problem: str) -> None:
        """Note something that must not happen."""
        self.lost += 1
        self.problems.append(problem)
        print(problem, file=sys.stderr, flush=True)


class Loop(threading.Thread):
    """Works until it is told to stop; its first round is undisturbed and the measure of all others."""

    def __init__(self, name: str, pace_s: float) -> None:
        super().__init__(name=name, daemon=True)
        self.pace_s, self.score = pace_s, Score()
        self.measured, self.stopping = threading.Event(), threading.Event()

    def run(self) -> None:
        """Round after round."""
        try:
            while not self.stopping.is_set():
                self.round()
                self.measured.set()
        except SplitflError as error:
            if not self.stopping.is_set():
                self.score.failed(f"{self.name}: {error}")
        finally:
            self.measured.set()

    @abstractmethod
    def round(self) -> None:
        """One."""

    @abstractmethod
    def resident(self) -> int | None:
        """Bytes in memory of a process that stays; None if there is none."""


class Steady(Loop):
    """A party whose process stays: every cycle must bring the losses, gradients and words of the first."""

    def __init__(self, name: str, pace_s: float, start: SoakStart, log: Path) -> None:
        super().__init__(name, pace_s)
        self._start, self._log = start, log
        self._child: Child | None = None
        self._first: dict[int, tuple[float, ...]] = {}

    def run(self) -> None:
        """Round after round, in one process."""
        words = ["splitfl.bench.soak_side", msgspec.json.encode(self._start).decode()]
        with Child(self.name, words, threads=1, log=self._log) as child:
            self._child = child
            try:
                child.ready(SoakReady)
            except SplitflError as error:
                self.score.failed(f"{self.name}: {error}")
                self.measured.set()
                return
            super().run()

    def round(self) -> None:
        """A cycle of steps, and some words with what it has learnt."""
        assert self._child is not None  # noqa: S101
        for number in range(CYCLE):
            if self.stopping.wait(self.pace_s):
                return
            came = self._child.ask(TrainOne(number=number), Trained, ANSWER_S)
            self.score.openings = came.openings
            self._compare(number, (came.loss, came.gradient), came.seconds)
        wrote = self._child.ask(WriteSome(new_tokens=NEW_TOKENS), Wrote, ANSWER_S)
        self._compare(CYCLE, tuple(map(float, wrote.tokens)), wrote.seconds)

    def _compare(self, place: int, came: tuple[float, ...], seconds: float) -> None:
        score = self.score
        score.done += 1
        score.longest_s = max(score.longest_s, seconds)
        expected = self._first.setdefault(place, came)
        if self.measured.is_set():
            score.compared += 1
            if came != expected:
                score.wrong += 1
                score.problems.append(f"{self.name}: step {place} brought {came}, not {expected}")

    def resident(self) -> int | None:
        """Of its process."""
        return None if self._child is None else resident(self._child.process.pid)


class Killed(Loop):
    """Real `splitfl tune` runs, killed at a random step and resumed: each must end with the adapter of the first."""

    def __init__(self, name: str, pace_s: float, home: Home, addresses: tuple[str, ...], draw: random.Random) -> None:
        super().__init__(name, pace_s)
        self._home, self._addresses, self._draw = home, addresses, draw
        self._runs = 0
        self._first: tuple[str, tuple[tuple[float, float], ...]] = ("", ())

    def round(self) -> None:
        """One run to its end, however often it is killed."""
        self._runs += 1
        run = self._home.logs / f"{self.name}-{self._runs}"
        address = self._addresses[self._runs % len(self._addresses)]
        kills = self._draw.choice((1, 1, 2)) if self.measured.is_set() else 0
        began = time.monotonic()
        for attempt in range(kills + 1):
            last = attempt == kills
            code = self._attempt(run, address, None if last else self._draw.randrange(1, RUN_STEPS), attempt > 0)
            if self.stopping.is_set():
                return
            self.score.kills += code == -signal.SIGKILL
            if code == 0:
                break
            if code != -signal.SIGKILL:
                said = run.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
                self.score.failed(f"{self.name}: run {self._runs} ended with code {code}: {' | '.join(said[-3:])}")
                return
        self._compare(run, time.monotonic() - began)
        self.stopping.wait(self.pace_s)

    def _attempt(self, run: Path, address: str, kill_at: int | None, resume: bool) -> int:
        words = ["tune", *self._home.link(self.name, address), "--train", str(assets() / "data/hospital.train.jsonl")]
        words += ["--out", str(run), "--max-steps", str(RUN_STEPS), "--save-steps", str(SAVE_STEPS), "--seed", "3"]
        words += ["--max-length", "48", "--truncation", "right", "--per-device-train-batch-size", "2"]
        words += [
            "--logging-steps",
            "1",
            "--lora-dropout",
            "0.1",
            "--timeout",
            "240",
            *(["--resume"] if resume else []),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPLITFL_LEDGER": str(self._home.logs / "ledger.sqlite")}
        with run.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "splitfl", *words], env=environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + RUN_S
        while (code := process.poll()) is None:
            if self.stopping.is_set() or time.monotonic() > deadline or (kill_at and _steps(run) >= kill_at):
                process.kill()
            time.sleep(0.1)
        return code if time.monotonic() <= deadline else 1

    def _compare(self, run: Path, seconds: float) -> None:
        adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        losses = {record["step"]: record["loss"] for record in _records(run)}
        came = hashlib.blake2b(adapter, digest_size=16).hexdigest(), tuple(sorted(losses.items()))
        self.score.done += 1
        self.score.longest_s = max(self.score.longest_s, seconds)
        if not self.measured.is_set():
            self._first = came
            return
        self.score.compared += 1
        if came != self._first:
            self.score.wrong += 1
            self.score.problems.append(f"{self.name}: run {self._runs} ended with another adapter or other losses")

    def resident(self) -> int | None:
        """None of its processes stays."""
        return None


def _records(run: Path) -> list[dict[str, float]]:
    """The training records of a run; a line under way is left out."""
    file = run / "run.jsonl"
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [record for record in map(json.loads, whole.splitlines()) if record["event"] == "train"]


def _steps(run: Path) -> int:
    return max((int(record["step"]) for record in _records(run)), default=0)
