"""The figures of `splitfl bench rules`: collected run by run, written after each, read again by ``--resume``."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitfl import __version__
from splitfl.bench.rules_cases import SCORES, TASKS, UNITS, parse_name
from splitfl.bench.rules_orders import RuleRun, TaskOpened
from splitfl.config import BenchSettings
from splitfl.errors import DataError, UsageError
from splitfl.metrics import Result, machine, write_results

FAILED = "failed"
"""1 for a run that ended in an error, in the place of all other figures."""
FACTS = {
    "training rows": "rows", "most training rows of a party": "rows", "fewest training rows of a party": "rows",
    "validation rows": "rows", "held-out rows": "rows", "values of an adapter": "values", "rounds": "rounds",
    "local steps": "steps", "rows of a batch": "rows", "parties": "parties", "rows come with splitfl": "",
}  # fmt: skip
_SAME = ("name", "quick", "parties", "rounds", "local_steps")


@dataclass(kw_only=True)
class Outcomes:
    """What has come out so far.

    Args:
        settings: of the command; its ``json`` is written after every run.
    """

    settings: BenchSettings
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task."""
    cells: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures by the name of the run."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why runs of this command failed."""

    def tell(self, task: str, opened: TaskOpened, rounds: tuple[int, int], *, shipped: bool) -> None:
        """Keep what belongs to a task.

        Raises:
            UsageError: runs of this task that are in the file already had other rows.
        """
        told: dict[str, float] = dict(
            zip(
                FACTS,
                (
                    sum(opened.train_rows), max(opened.train_rows), min(opened.train_rows),
                    sum(opened.validation_rows), sum(opened.held_out_rows), opened.tuned_values, *rounds,
                    TASKS[task].batch, len(opened.train_rows), int(shipped),
                ),
                strict=True,
            )
        )  # fmt: skip
        if self.told.get(task, told) != told:
            raise UsageError(
                f"The runs of task {task!r} in {self.settings.json} had other rows or lengths.",
                hint="leave --resume out to run everything anew, or name another --json file",
            )
        self.told[task] = told

    def note(self, name: str, run: RuleRun) -> None:
        """Keep the figures of a run, or that there are none."""
        if run.failed:
            self.reasons[name] = run.failed
        self.cells[name] = {FAILED: 1.0} if run.failed else dict(run.figures)
        if self.settings.json is not None:
            write_results(self.settings.json, "bench", self.settings, self.results())

    def results(self) -> list[Result]:
        """Everything, in the shape of ``--json``: first what belongs to a task, then run by run."""
        facts = [
            Result(case=task, metric=metric, value=value, unit=FACTS[metric])
            for task, told in self.told.items()
            for metric, value in told.items()
        ]
        return facts + [
            Result(case=name, metric=metric, value=value, unit=_unit(name, metric))
            for name, figures in self.cells.items()
            for metric, value in figures.items()
        ]

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


def _unit(name: str, metric: str) -> str:
    if metric in SCORES:
        return "share" if TASKS[parse_name(name).setting.task].higher_is_better else "nats"
    return UNITS.get(metric.partition(", round ")[0], "")


def read_record(path: Path) -> dict[str, Any]:
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
    if found != ("bench", "rules") or not complete:
        raise DataError(f"{path} holds other figures.", expected="a file that `splitfl bench rules --json` wrote")
    return dict(record)


def by_case(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What is told of tasks, and the figures of runs, from the results of a file.

    A figure that was not finite is null in the file, and infinite here.

    Raises:
        DataError: a case that is neither.
    """
    told: dict[str, dict[str, float]] = defaultdict(dict)
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        case, value = result["case"], result["value"]
        if case not in TASKS:
            parse_name(case)
        into = told if case in TASKS else cells
        into[case][result["metric"]] = math.inf if value is None else value
    return dict(told), dict(cells)
