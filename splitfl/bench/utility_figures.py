"""The figures of `splitfl bench utility`: collected run by run, written after each, read again by ``--resume``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfl import __version__
from splitfl.bench.utility_cases import (
    FIGURES,
    ONCE,
    RATIO,
    REFERENCE,
    SCORES,
    TASKS,
    UNITS,
    WHOLE_RUN,
    Cell,
    CutFacts,
    Task,
    reference_name,
)
from splitfl.bench.utility_orders import Trained
from splitfl.config import BenchSettings
from splitfl.errors import DataError, UsageError
from splitfl.metrics import Result, machine, write_results

KEPT = "share of the reference's gain kept"
_SAME = ("name", "max_steps", "quick")  # settings that a figure depends on, beside its case
_FIXED = ("training rows", "held-out rows", "steps", "rows of a batch", "learning rate")
_FACT_UNITS = {
    "r": "", "clip": "", "rows beyond the clip": "share", "tokens of a median row": "tokens", "training rows": "rows",
    "held-out rows": "rows", "vocabulary": "tokens", "steps": "steps", "rows of a batch": "rows", "learning rate": "",
    "rows come with splitfl": "",
}  # fmt: skip


def gain_kept(task: Task, figures: Mapping[str, float], reference: Mapping[str, float] | None) -> float | None:
    """How much of what the reference gained over the untuned model this run gained too; 1 is all, below 0 is harm.

    Args:
        task: says which score.
        figures: of the run.
        reference: figures of LoRA on the whole model with the same seed.

    Returns:
        None where there is no reference, or the reference gained nothing.
    """
    if reference is None or task.metric not in figures:
        return None
    base = reference[f"{task.metric} before"]
    sign = 1 if task.higher_is_better else -1
    gained = sign * (reference[task.metric] - base)
    return sign * (figures[task.metric] - base) / gained if gained > 0 else None


@dataclass(kw_only=True)
class Outcomes:
    """What has come out so far.

    Args:
        settings: of the command; its ``json`` is written after every run.
    """

    settings: BenchSettings
    facts: dict[str, CutFacts] = field(default_factory=dict)
    """By task."""
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    """What is written of a task, under the names in the file."""
    cells: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of the runs that are done, by the name of the cell."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why others are not."""

    def note_facts(self, name: str, facts: CutFacts, steps: int, *, shipped: bool) -> None:
        """Keep what was measured of a task.

        Raises:
            UsageError: runs of this task that are in the file already were trained otherwise.
        """
        task = TASKS[name]
        told: dict[str, float] = {
            "r": facts.norm,
            "clip": facts.clip,
            "rows beyond the clip": facts.clipped,
            "tokens of a median row": facts.median_length,
            "training rows": facts.train_rows,
            "held-out rows": facts.held_out_rows,
            "vocabulary": facts.vocabulary,
            "steps": steps,
            "rows of a batch": task.batch,
            "learning rate": task.learning_rate,
            "rows come with splitfl": int(shipped),
        }
        earlier = self.told.get(name)
        if earlier is not None:
            other = [fact for fact in _FIXED if earlier.get(fact) != told[fact]]
            if other:
                raise UsageError(
                    f"The runs of task {name!r} in {self.settings.json} had other {', '.join(other)}.",
                    hint="leave --resume out to run everything anew, or name another --json file",
                )
        self.facts[name], self.told[name] = facts, told

    def note(self, cell: Cell, trained: Trained, noise: Mapping[str, float]) -> None:
        """Keep the figures of a run, or why there are none."""
        if trained.failed:
            self.failed[cell.name] = trained.failed
        else:
            self.cells[cell.name] = {**trained.figures, **noise}
        if self.settings.json is not None:
            write_results(self.settings.json, "bench", self.settings, self.results())

    def results(self) -> list[Result]:
        """Everything, in the shape of ``--json``: first what belongs to a task, then run by run."""
        results = [
            Result(case=task, metric=metric, value=value, unit=_FACT_UNITS[metric])
            for task, told in self.told.items()
            for metric, value in told.items()
        ]
        for name, figures in self.cells.items():
            results += self._of_run(name, figures)
        return results

    def _of_run(self, name: str, figures: Mapping[str, float]) -> list[Result]:
        task, design, _, seed = parse_name(name)
        reference = None if design == REFERENCE else self.cells.get(reference_name(task, seed))
        results = []
        for metric, value in figures.items():
            compared = reference.get(metric) if reference is not None and metric in (*SCORES, "seconds") else None
            unit = UNITS[metric.removesuffix(" before")]
            results.append(Result(case=name, metric=metric, value=value, unit=unit, reference=compared))
        if design != REFERENCE:
            kept = gain_kept(TASKS[task], figures, reference)
            results.append(Result(case=name, metric=KEPT, value=kept, unit="share"))
        return results

    @classmethod
    def resumed(cls, settings: BenchSettings) -> Outcomes:
        """The figures in the ``--json`` file of a run that was broken off; none if there is no such file.

        Raises:
            UsageError: no file was named, or it is of other settings, another machine or another version.
            DataError: it is no file of figures.
        """
        outcomes = cls(settings=settings)
        if settings.json is None:
            raise UsageError("--resume needs the file with the figures so far.", hint="add --json FILE")
        if not settings.json.exists():
            return outcomes
        record = read_record(settings.json)
        before = (record["version"], record["machine"], [record["settings"].get(name) for name in _SAME])
        if before != (__version__, machine(), [getattr(settings, name) for name in _SAME]):
            raise UsageError(
                f"The figures in {settings.json} are of other settings, another machine or another version.",
                hint="leave --resume out to run everything anew, or name another --json file",
            )
        outcomes.told, outcomes.cells = by_case(record["results"])
        return outcomes


def parse_name(case: str) -> tuple[str, str, str, int]:
    """Task, design, level and seed of a run's name.

    Raises:
        DataError: the name of no run.
    """
    parts = case.split(" / ")
    if len(parts) == 4 and parts[0] in TASKS and parts[3].removeprefix("seed ").isdigit():
        return parts[0], parts[1], parts[2].removeprefix("r/sigma "), int(parts[3].removeprefix("seed "))
    raise DataError(f"{case!r} names no run of splitfl bench utility.")


def read_record(path: Any) -> dict[str, Any]:
    """A ``--json`` file of this benchmark.

    Raises:
        DataError: it cannot be read, or is of another command.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = (record["command"], record["settings"]["name"])
        for result in record["results"]:
            Result(**result)
        complete = {"version", "machine"} <= record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a file of figures ({type(error).__name__}).") from error
    if found != ("bench", "utility") or not complete:
        raise DataError(f"{path} holds other figures.", expected="a file that `splitfl bench utility --json` wrote")
    return dict(record)


def by_case(
    results: list[dict[str, Any]],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What is told of tasks, and the figures of runs, from the results of a file; what is derived is left out."""
    told: dict[str, dict[str, float]] = defaultdict(dict)
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    known = {*FIGURES, *(f"{name} before" for name in SCORES), RATIO, ONCE, WHOLE_RUN}
    for result in results:
        if result["case"] in TASKS:
            told[result["case"]][result["metric"]] = result["value"]
        elif result["metric"] in known and result["value"] is not None:
            parse_name(result["case"])
            cells[result["case"]][result["metric"]] = result["value"]
    return dict(told), dict(cells)
