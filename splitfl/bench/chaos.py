"""``splitfl bench chaos``: runs that are broken on purpose, each beside an undisturbed one of the same design.

For each case and seed a schedule is drawn: links cut, held and slowed, messages lost, repeated, delayed and reordered,
owner and party killed (-9). The run must end by itself with the adapter, or the text, of the undisturbed one, to the
bit; no request may be said twice in different bytes; and where noise was drawn, no batch may leave in a second form.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from splitfl.bench.chaos_cases import CASES, Case
from splitfl.bench.chaos_run import (
    PARTY,
    Outcome,
    Party,
    Road,
    disturbed,
    generate_words,
    tune_words,
    undisturbed,
    undisturbed_text,
)
from splitfl.bench.children import run_to_end
from splitfl.bench.message_faults import Rates
from splitfl.bench.run import earlier_results
from splitfl.bench.served import BOTTOM, TOP, Home, Served, furnish
from splitfl.config import BenchSettings
from splitfl.errors import InternalError, RefusedError
from splitfl.metrics import Result, write_results
from splitfl.report import as_duration

QUICK_CASES = ("split, everything", "generate, everything")
_REPLACED_AT = 0.4
_FOREIGN_LAYER = ".layers.5."


def bench_chaos(settings: BenchSettings) -> None:
    """Run every case with every seed, and write the figures after each.

    Raises:
        InternalError: a run did not come out as it must.
        ResourceError, UnreachableError: a process could not be started, or did not end.
    """
    seeds = settings.seeds or tuple(range(2 if settings.quick else settings.runs))
    cases = [case for case in CASES if not settings.quick or case.name in QUICK_CASES]
    results = earlier_results(settings, _is_whole) if settings.resume else []
    done = {result.case for result in results}
    left = [(case, seed) for case in cases for seed in seeds if _name(case, seed) not in done]
    with tempfile.TemporaryDirectory(prefix="splitfl-chaos-") as temporary:
        home = furnish(Path(temporary), (PARTY, "relay"))
        with Served(home, "owner") as owner:
            trials = _Trials(home, owner, Path(temporary))
            began = time.monotonic()
            for number, (case, seed) in enumerate(left):
                found = trials.run(case, seed)
                results += found
                if settings.json is not None:
                    write_results(settings.json, "bench", settings, results)
                spent = time.monotonic() - began
                rest = as_duration(spent / (number + 1) * (len(left) - number - 1))
                _say(f"[{number + 1}/{len(left)}] {_name(case, seed)}: {in_words(found)}; about {rest} left")
    wrong = [f"{r.case}: {r.metric} is {r.value}" for r in results if r.reach is not None and r.value != r.reach]
    print(summary(results), flush=True)
    if wrong:
        raise InternalError(f"{len(wrong)} figures are not what they must be: {'; '.join(wrong[:10])}.")


def _is_whole(group: list[Result]) -> bool:
    """The figures of a run are written together."""
    return any(result.metric == "exit code" for result in group)


def _name(case: Case, seed: int) -> str:
    return f"{case.name}, seed {seed}"


class _Trials:
    """The undisturbed runs, made when they are first needed, and those beside them."""

    def __init__(self, home: Home, owner: Served, folder: Path) -> None:
        self._home, self._owner, self._folder = home, owner, folder
        self._whole: dict[str, Outcome] = {}
        self._foreign: Home | None = None

    def run(self, case: Case, seed: int) -> list[Result]:
        """One run of a case and what it came to."""
        folder = self._folder / f"{CASES.index(case)}-{seed}"
        whole = self._undisturbed(case)
        if case.work == "replaced":
            return self._replaced(case, seed, folder, whole)
        if case.work == "generate":
            whole = self._undisturbed_text(case)
        came = disturbed(self._home, self._owner, case, seed, folder, whole, self._run_of(case))
        shutil.rmtree(folder, ignore_errors=True)
        return judged(case, seed, came, whole)

    def _run_of(self, case: Case) -> Path:
        return self._folder / case.design.replace(" ", "-") / "run"

    def _undisturbed(self, case: Case) -> Outcome:
        if case.design not in self._whole:
            _say(f"{case.design}: a run without faults")
            whole = undisturbed(self._home, self._owner, case, self._run_of(case).parent)
            self._whole[case.design] = _sound(whole)
        return self._whole[case.design]

    def _undisturbed_text(self, case: Case) -> Outcome:
        name = f"{case.design}, text"
        if name not in self._whole:
            words_of = generate_words(self._home, self._run_of(case), self._folder / "text")
            whole = undisturbed_text(self._home, self._owner, case, self._folder / "text", words_of)
            self._whole[name] = _sound(whole)
        return self._whole[name]

    def _replaced(self, case: Case, seed: int, folder: Path, whole: Outcome) -> list[Result]:
        """The owner is killed, and at its address another trunk is served: the run must end with a refusal."""
        if self._foreign is None:
            self._foreign = _foreign(self._home, self._folder / "foreign")
        folder.mkdir()
        other = Served(self._foreign, "foreign")
        other.address = self._owner.address
        with Road(self._home, self._owner, Rates(), seed) as road:
            party = Party(folder, [*tune_words(self._home, case, folder / "run"), *road.words()])
            began: list[threading.Thread] = []

            def replace() -> None:
                self._owner.kill()
                began.append(threading.Thread(target=other.start, daemon=True))
                began[-1].start()

            assert road.proxy is not None  # noqa: S101
            road.proxy.after(round(_REPLACED_AT * whole.up), replace)
            code = party.run()
        for thread in began:
            thread.join()
        other.end()
        self._owner.start()
        said = (folder / "party.log").read_text(encoding="utf-8", errors="replace")
        name = _name(case, seed)
        return [
            Result(case=name, metric="exit code", value=code, unit="", reach=RefusedError.exit_code),
            Result(case=name, metric="said why", value=int("was cut from trunk" in said), unit="", reach=1),
            Result(case=name, metric="adapter written", value=int((folder / "run/adapter").exists()), unit="", reach=0),
        ]


def _sound(whole: Outcome) -> Outcome:
    if whole.code or whole.altered:
        raise InternalError(f"A run without any fault ended with code {whole.code}: {whole.said}")
    return whole


def judged(case: Case, seed: int, came: Outcome, whole: Outcome) -> list[Result]:
    """A run beside the undisturbed one; figures with a reach must have exactly that value."""
    name = _name(case, seed)
    rows = [("exit code", came.code, 0), ("requests said again in other bytes", came.altered, 0)]
    if case.work == "generate":
        rows.append(("another text", int(came.text != whole.text or not came.text), 0))
    elif case.same:
        differs = came.adapter != whole.adapter or came.losses != whole.losses or not came.adapter
        rows.append(("another adapter or other losses", int(differs), 0))
    if case.once or (case.same and case.work == "tune"):
        rows.append(("hidden states that left in another form", came.forms - whole.forms, 0))
    results = [Result(case=name, metric=metric, value=value, unit="", reach=reach) for metric, value, reach in rows]
    extra = Result(
        case=name, metric="releases booked beyond those of an undisturbed run", value=came.booked - whole.booked,
        unit="", reach=0 if case.once or not case.party_kills else None,
    )  # fmt: skip
    results.append(extra)
    if came.code:
        results.append(Result(case=name, metric="last words", value=came.said, unit=""))
    facts = {"requests said again": came.repeated, "processes of the party": came.starts, **came.happened}
    results += [Result(case=name, metric=metric, value=value, unit="") for metric, value in facts.items() if value]
    results.append(Result(case=name, metric="seconds", value=round(came.seconds, 1), unit="s"))
    return results


def _foreign(home: Home, folder: Path) -> Home:
    """The same model with one tensor of its trunk changed by a hundredth, and a kit of its own."""
    from safetensors.torch import load_file, save_file  # torch only where it is needed: bfloat16

    model = folder / "model"
    shutil.copytree(home.model, model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if _FOREIGN_LAYER in name and tensors[name].ndim == 2)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    cut = ["--bottom", str(BOTTOM), "--top", str(TOP), "--no-verify"]
    run_to_end(["splitfl", "kit", str(folder / "kit"), "--model", str(model), *cut], log=folder / "kit.log")
    return dataclasses.replace(home, model=model, kit=folder / "kit", logs=folder)


def in_words(found: list[Result]) -> str:
    """One run in a line."""
    wrong = [f"{r.metric}: {r.value}" for r in found if r.reach is not None and r.value != r.reach]
    seconds = next((r.value for r in found if r.metric == "seconds"), None)
    return ("; ".join(wrong) if wrong else "as it must be") + (f", {seconds} s" if seconds is not None else "")


def summary(results: list[Result]) -> str:
    """All runs, case by case."""
    runs: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for case in dict.fromkeys(result.case for result in results):
        name = case.rpartition(", seed ")[0]
        runs[name] += 1
        bad[name] += any(r.case == case and r.reach is not None and r.value != r.reach for r in results)
    return "\n".join(f"{name}: {runs[name]} runs, {bad[name]} not as they must be" for name in runs)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
