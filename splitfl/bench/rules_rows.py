"""The rows of `splitfl bench rules`: who holds which, and the files that its worker reads.

*answers* lies with the parties as nature would have it: each holds what one source has written, as much of the
training rows as the source has of them all. *polarity* is skewed by label: the first party has one positive row in ten,
the last nine in ten, the others steps in between; a party's validation and held-out rows are skewed as its training
rows are, and those of all together are even. Validation rows come from the training file and are not trained on.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.bench.rules_cases import TASKS, Task
from splitfl.bench.rules_orders import PartyFiles
from splitfl.bench.utility_cases import TASKS as UTILITY_TASKS
from splitfl.bench.utility_rows import model_of, shared_data
from splitfl.demo import assets
from splitfl.errors import DataError, UsageError, nearest, printable

_SHIPPED_SOURCES = ("hospital", "clinic")
_SHIPPED_LABELS = ("sentiment.train.csv", "sentiment.test.csv")
_FEWEST_HELD_OUT = 4
_LEAST_PRAISE, _MOST_PRAISE = 0.1, 0.9
_ROWS = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A task's model, and the folder of its shared rows; None where those that come with splitfl are used."""

    task: Task
    model: Path
    shared: Path | None


@dataclass(frozen=True, kw_only=True)
class Held:
    """The rows of one party."""

    train: _ROWS
    validation: _ROWS
    held_out: _ROWS


def find_places(names: Sequence[str]) -> tuple[list[Place], list[str]]:
    """The tasks that can be run here, and for each that cannot a sentence saying what is missing.

    Args:
        names: those asked for; none means all.

    Raises:
        UsageError: a name that is no task of this benchmark, or one asked for that cannot be run, or none that can.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"There is no task {printable(name, 40)!r} here.", hint=nearest(name, TASKS))
    places, missing = [], []
    for task in TASKS.values():
        if names and task.name not in names:
            continue
        model = model_of(UTILITY_TASKS[task.name])  # of the task of that name there, which has the same
        folder = shared_data() / task.shared
        if model is None:
            missing.append(
                f"Task {task.name!r} is left out: its model is not installed (pip install 'splitfl[minilm]')."
            )
        else:
            places.append(Place(task=task, model=model, shared=folder if folder.is_dir() else None))
    if missing and (names or not places):
        raise UsageError(" ".join(missing), hint="leave the task out of --tasks, or get what it lacks")
    return places, missing


def write_parties(place: Place, task: Task, parties: int, folder: Path) -> tuple[PartyFiles, ...]:
    """Each party's files of rows, as JSON Lines.

    Args:
        task: that of `place`, perhaps with fewer rows.
        folder: where they go.

    Raises:
        DataError: a file that has not what the task needs, or too few rows for so many parties.
    """
    held = _by_label(place, task, parties) if task.classes else _by_source(place, task, parties)
    return tuple(_written(party, f"{task.name}-{number}", folder) for number, party in enumerate(held))


def _written(party: Held, name: str, folder: Path) -> PartyFiles:
    files = {}
    for what in ("train", "validation", "held_out"):
        rows = getattr(party, what)
        if not rows:
            raise DataError(f"Party {name} has no rows of its own.", hint="fewer --parties")
        target = folder / f"{name}.{what}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[what] = str(target)
    return PartyFiles(**files)


# ---- by source


def _by_source(place: Place, task: Task, parties: int) -> list[Held]:
    train, held_out = _sources(place.shared, parties)
    names = sorted(train, key=lambda name: -len(train[name]))
    names = [name for name in names if len(held_out.get(name, ())) >= _FEWEST_HELD_OUT][:parties]
    if len(names) < parties:
        raise DataError(
            f"{parties} parties need as many sources; {len(names)} have rows enough.", hint="fewer --parties"
        )
    of_all = sum(len(train[name]) for name in names)
    found = []
    for name in names:
        rows = train[name]
        count = max(task.batch, round(task.train_rows * len(rows) / of_all))
        found.append(
            Held(
                train=rows[: min(count, len(rows) - task.validation_rows)],
                validation=rows[-task.validation_rows :],
                held_out=held_out[name][: task.held_out_rows],
            )
        )
    return found


def _sources(folder: Path | None, parties: int) -> tuple[dict[str, _ROWS], dict[str, _ROWS]]:
    """Training and held-out rows by source. Shipped rows have two, each dealt out to half of the parties."""
    train: dict[str, _ROWS] = {}
    held_out: dict[str, _ROWS] = {}
    if folder is not None:
        for into, name in ((train, "train.jsonl"), (held_out, "test.jsonl")):
            for row in _read(folder / name, ("question", "answer", "source")):
                one = {"prompt": row["question"], "completion": row["answer"]}
                into.setdefault(str(row["source"]), []).append(one)
        return train, held_out
    for number in range(parties):
        source, part = _SHIPPED_SOURCES[number % 2], number // 2
        of = (parties + 1 - number % 2) // 2
        for into, end in ((train, "train"), (held_out, "held")):
            rows = _read(assets() / "data" / f"{source}.{end}.jsonl", ("prompt", "completion"))
            into[f"{source} {part}"] = rows[part::of]
    return train, held_out


# ---- by label


def _by_label(place: Place, task: Task, parties: int) -> list[Held]:
    folder = assets() / "data" if place.shared is None else place.shared
    names = _SHIPPED_LABELS if place.shared is None else ("train.jsonl", "test.jsonl")
    pools = [_Pool(_read(folder / name, ("text", "label")), folder / name) for name in names]
    learnt = min(task.train_rows // parties + task.validation_rows, pools[0].even // parties)
    kept = min(task.held_out_rows, pools[1].even // parties)
    validation = min(task.validation_rows, learnt // 4)
    found = []
    for number in range(parties):
        praise = _LEAST_PRAISE + (_MOST_PRAISE - _LEAST_PRAISE) * number / (parties - 1)
        found.append(
            Held(
                train=pools[0].take(learnt - validation, praise),
                validation=pools[0].take(validation, praise),
                held_out=pools[1].take(kept, praise),
            )
        )
    return found


class _Pool:
    """Rows of two labels, which are handed out once."""

    def __init__(self, rows: _ROWS, source: Path) -> None:
        self._rows: dict[int, _ROWS] = {0: [], 1: []}
        for row in rows:
            if str(row["label"]) not in ("0", "1"):
                raise DataError(f"{source} has a label that is not known.", expected="0 or 1")
            self._rows[int(row["label"])].append({"text": row["text"], "label": int(row["label"])})
        self.even = 2 * min(map(len, self._rows.values()))

    def take(self, count: int, praise: float) -> _ROWS:
        """`count` rows of which that share is positive, the two in turn as far as they go."""
        wanted = Counter({1: round(count * praise)})
        wanted[0] = count - wanted[1]
        rows: _ROWS = []
        for label, number in wanted.items():
            rows += [self._rows[label].pop() for _ in range(number)]
        return rows


def _read(source: Path, fields: Sequence[str]) -> _ROWS:
    try:
        with source.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file)) if source.suffix == ".csv" else [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as rows ({type(error).__name__}).") from error
    if any(field not in row for row in rows for field in fields):
        raise DataError(f"{source} lacks a field that the task needs.", expected=", ".join(fields))
    return rows
