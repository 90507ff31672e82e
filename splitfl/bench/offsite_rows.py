"""Where models, rows and public text of `splitfl bench offsite` are, and the files that its runs read.

Public text is what emulators are distilled on: never rows of a task.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.bench.offsite_cases import BOTTOM, TASKS, TOP, Task
from splitfl.bench.utility_rows import shared_data
from splitfl.demo import assets
from splitfl.errors import DataError, UsageError, nearest, printable

EMBEDDED = "embedded"
_VALIDATION = 6  # one training row in so many is kept for trials of learning rates
_CHARACTERS = 700  # of a public text: about what an example of a distillation holds
_PUBLIC = (("tinystories_4mb", "train.jsonl", 900), ("gutenberg_books", "train.jsonl.gz", 600),
           ("wikitext2", "train.txt", 300))  # fmt: skip
_SHIPPED_TEXT = ("clinic.train.jsonl", "clinic.held.jsonl")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model under its name in tables."""

    name: str
    path: Path
    layers: int
    keep: int
    """Layers of the trunk in its emulator."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A task's files on this machine."""

    task: Task
    train: Path
    held_out: Path
    shipped: bool


# ---- models


def find_models(asked: tuple[str, ...], keep: int | None) -> list[Model]:
    """The models that the settings name.

    Args:
        asked: ``embedded``, directories, or NAME=DIRECTORY; none means the embedded one.
        keep: layers of the trunk in an emulator; None is half.

    Raises:
        UsageError: a directory that is no model, a name that occurs twice, or a trunk that leaves nothing to keep.
    """
    models: list[Model] = []
    for word in asked or (EMBEDDED,):
        model = _model(word, keep)
        if any(model.name == other.name for other in models):
            raise UsageError(f"Two models are called {model.name!r}.", hint="give one another name: NAME=DIRECTORY")
        models.append(model)
    return models


def _model(word: str, keep: int | None) -> Model:
    name, given, directory = word.partition("=")
    if not given:
        name, directory = (EMBEDDED, str(assets() / "model")) if word == EMBEDDED else (Path(word).resolve().name, word)
    if not name or " / " in name or not name.isprintable():
        raise UsageError(f"{printable(name, 40)!r} is no name for a model.", expected="NAME=DIRECTORY")
    path = Path(directory)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        layers = next(int(config[key]) for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config)
    except (OSError, ValueError, TypeError, StopIteration) as error:
        raise UsageError(
            f"{path} holds no model whose layers can be counted ({type(error).__name__}).",
            expected="a directory with config.json and safetensors",
            hint="say embedded for the one that comes with splitfl",
        ) from error
    trunk = layers - BOTTOM - TOP
    kept = trunk // 2 if keep is None else keep
    if trunk < 2 or not 1 <= kept < trunk:
        raise UsageError(
            f"The model {name!r} has {layers} layers, {BOTTOM} below and {TOP} above the cut: of a trunk of "
            f"{max(trunk, 0)}, no emulator of {kept} layers can be made.",
            expected=f"--keep 1 to {trunk - 1}" if trunk > 1 else f"a model of {BOTTOM + TOP + 2} layers or more",
        )
    return Model(name=name, path=path, layers=layers, keep=kept)


# ---- tasks


def find_tasks(names: tuple[str, ...]) -> tuple[list[Place], list[str]]:
    """The tasks that can be run here, and for each that cannot a sentence saying what is missing.

    Args:
        names: those asked for; none means all.

    Raises:
        UsageError: a name that is no task, or one asked for by name that cannot be run.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"There is no task {printable(name, 40)!r}.", hint=nearest(name, TASKS))
    places, missing = [], []
    for task in TASKS.values():
        if names and task.name not in names:
            continue
        folder = shared_data() / task.shared
        if task.shared and (folder / "train.jsonl").is_file():
            place = Place(task=task, train=folder / "train.jsonl", held_out=folder / "test.jsonl", shipped=False)
            places.append(place)
        elif task.shipped is not None:
            train, held_out = (assets() / "data" / name for name in task.shipped)
            places.append(Place(task=task, train=train, held_out=held_out, shipped=True))
        else:
            missing.append(
                f"Task {task.name!r} is left out: its rows are not shipped, and there is no data/{task.shared} in the "
                "folder that $SPLITFL_SHARED names."
            )
    if missing and names:
        raise UsageError(" ".join(missing), hint="leave the task out of --tasks, or get what it lacks")
    return places, missing


@dataclass(frozen=True, kw_only=True)
class RowFiles:
    """Files of a task, as JSON Lines under our names of fields."""

    train: Path
    """All training rows."""
    trial: Path
    """Those without the validation rows."""
    validation: Path
    held_out: Path


def write_rows(place: Place, folder: Path, counts: tuple[int, int]) -> RowFiles:
    """Write a task's files.

    Args:
        place: where the rows come from.
        folder: where the files go.
        counts: at most so many training and held-out rows; of each class as many.

    Raises:
        DataError: a file that has not what the task needs.
    """
    train = _even(list(_read(place.train)), place.task, counts[0], place.train)
    held_out = _even(list(_read(place.held_out)), place.task, counts[1], place.held_out)
    chosen = set(range(_VALIDATION - 1, len(train), _VALIDATION))
    parts = {
        "train": train,
        "trial": [row for number, row in enumerate(train) if number not in chosen],
        "validation": [train[number] for number in sorted(chosen)],
        "held-out": held_out,
    }
    files = {}
    for part, rows in parts.items():
        files[part.replace("-", "_")] = folder / f"{place.task.name}.{part}.jsonl"
        _write(files[part.replace("-", "_")], rows)
    return RowFiles(**files)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read(source: Path) -> Iterator[dict[str, Any]]:
    try:
        with source.open("rb") as raw, gzip.open(raw) if source.suffix == ".gz" else raw as content:
            file = io.TextIOWrapper(content, encoding="utf-8", newline="")
            if source.suffix == ".csv":
                yield from csv.DictReader(file)
            elif ".txt" in source.suffixes:
                yield from ({"text": line} for line in file)
            else:
                yield from (json.loads(line) for line in file)
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read as rows ({type(error).__name__}).") from error


def _even(rows: list[dict[str, Any]], task: Task, count: int, source: Path) -> list[dict[str, Any]]:
    """The first rows of each class, as many of each; of a prompt that comes several times, the first one."""
    if any(field not in row for row in rows for field in task.fields):
        raise DataError(f"{source} lacks a field that the task needs.", expected=", ".join(task.fields))
    names = ("text", "label") if task.classes else ("prompt", "completion")
    kept: list[dict[str, Any]] = []
    taken: Counter[int] = Counter()
    seen: set[str] = set()
    for row in rows:
        one = {name: row[field] for name, field in zip(names, task.fields, strict=True)}
        if one[names[0]] in seen:
            continue
        if task.classes:
            one["label"] = _class(one["label"], task, source)
            if taken[one["label"]] >= count // task.classes:
                continue
            taken[one["label"]] += 1
        seen.add(one[names[0]])
        kept.append(one)
        if len(kept) >= count:
            break
    return kept


def _class(label: Any, task: Task, source: Path) -> int:
    if task.labels and label not in task.labels:
        raise DataError(f"{source} holds a class that the task has not.", expected=", ".join(task.labels))
    return task.labels.index(label) if task.labels else int(label)


# ---- public text


def write_public_text(folder: Path, *, quick: bool) -> tuple[Path, bool]:
    """A file of public texts, and whether they come with splitfl.

    Where the shared data is not there, questions and answers of another hospital stand in, which come with splitfl.
    """
    sources = [(shared_data() / name / file, count) for name, file, count in _PUBLIC]
    shipped = not all(path.is_file() for path, _ in sources)
    if shipped:
        rows = [row for name in _SHIPPED_TEXT for row in _read(assets() / "data" / name)]
        texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
    else:
        texts = [text for path, count in sources for text in _long_enough(path, 8 if quick else count)]
    target = folder / "public.jsonl"
    _write(target, [{"text": text[:_CHARACTERS]} for text in (texts[:40] if quick else texts)])
    return target, shipped


def _long_enough(path: Path, count: int) -> list[str]:
    """`count` texts of a source, taken at even distances, none shorter than a sentence or two."""
    found = [text for row in _read(path) if len(text := row["text"].strip()) > _CHARACTERS // 4]
    return found[:: max(1, len(found) // count)][:count]
