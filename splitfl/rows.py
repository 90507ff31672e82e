"""Step 1 of the journey, second of four: records -> checked rows, all of one form.

The first bad row stops the reading: the error names file and line, the keys found there and their types, and what is
expected. It never shows what a row holds; for that reason the header of a table is not repeated either, because in a
file without a header the first row stands in its place.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from splitfl.errors import DataError, UsageError, nearest, printable
from splitfl.records import open_records, place

Task: TypeAlias = Literal["causal-lm", "sequence-classification"]
FormName: TypeAlias = Literal["messages", "prompt-completion", "instruction", "text", "labelled pair", "labelled text"]
Turn: TypeAlias = dict[str, Any]

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
_TYPES = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
_TURN = "turns with role and content, both strings, content not blank"
_MAY_BE_BLANK = ("system", "developer")
_SHOWN_NAMES = 12


@dataclass(frozen=True, slots=True)
class Form:
    """One shape that a row may have."""

    name: FormName
    task: Task
    need: tuple[str, ...]
    """Fields that must be there and not null."""
    says: str
    may: tuple[str, ...] = ()
    """Fields that can be empty, null or left out."""


_CONTEXT = ("input", "context")
# The first form that fits a row is taken, so a row that also carries its own rendering as `text` is read by its parts.
FORMS = (
    Form("messages", "causal-lm", ("messages",), "messages (a list of turns with role and content)"),
    Form("prompt-completion", "causal-lm", ("prompt", "completion"), "prompt and completion"),
    Form("instruction", "causal-lm", ("instruction", "output"), "instruction, output and perhaps input", _CONTEXT),
    Form(
        "instruction", "causal-lm", ("instruction", "response"), "instruction, response and perhaps context", _CONTEXT
    ),
    Form("text", "causal-lm", ("text",), "text"),
    Form("labelled pair", "sequence-classification", ("text", "text_pair", "label"), "text, text_pair and label"),
    Form("labelled text", "sequence-classification", ("text", "label"), "text and label"),
)
_OUR_NAMES = frozenset(name for form in FORMS for name in form.need + form.may)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Row:
    """One checked row. Which fields are set follows from the form of the file; the others stay None or empty."""

    line: int
    """Where the row begins, from 1: line of the file, or row of the saved data set."""
    text: str | None = None
    text_pair: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Turn, ...] = ()
    answers_from: int = 0
    """First turn of `messages` that may count as an answer."""
    label: int | str | None = None
    person: str | None = None
    """Whom the row belongs to, where a column says so; for accounting alone, and part of no text."""

    def __repr__(self) -> str:
        return f"Row(line={self.line})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Rows(Sequence[Row]):
    """The rows of one file, all of one form."""

    path: Path
    task: Task
    form: FormName
    rows: tuple[Row, ...]
    label2id: Mapping[str, int] = field(default_factory=dict)
    """Class name -> class number; empty for a causal language model."""
    paragraphs: bool = False
    """Whether the rows are paragraphs of a running text, which may be cut anywhere."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"Rows({str(self.path)!r}, form={self.form!r}, {len(self.rows)} rows)"

    def place(self, row: Row) -> str:
        """`file:line`, safe to print."""
        return place(self.path, row.line)

    def class_number(self, row: Row) -> int:
        """The label of a row as a class number."""
        return self.label2id[row.label] if isinstance(row.label, str) else int(row.label or 0)


def load_rows(
    path: Path, *, columns: Mapping[str, str] | None = None, task: Task, label2id: Mapping[str, int] | None = None,
    person_column: str | None = None,
) -> Rows:  # fmt: skip
    """Read and check every row of a file or of a saved data set.

    Args:
        path: JSON Lines, CSV, TSV or plain text (each also as ``.gz``; a paragraph of plain text is a row), or a
            directory written by `Dataset.save_to_disk`; of a saved `DatasetDict` the split `train` is taken, or the
            one named after a colon: ``dir:validation``.
        columns: our field -> the file's column, for example ``{"prompt": "question", "completion": "answer"}``. Only
            forms that have all the fields named here are considered; fields not named keep their own name.
        task: what the rows are for; decides which of `FORMS` are allowed.
        label2id: class name -> class number, as in a model's configuration. Without it (or when it holds nothing but
            the library's ``LABEL_0``, ``LABEL_1``, ...) words are numbered in sorted order. Give the training rows'
            `Rows.label2id` when reading the evaluation rows: a file that lacks a class would be numbered otherwise.
        person_column: the file's column that says whose row it is; every row must have it.

    Raises:
        DataError: a file that cannot be read, or its first bad row, by file and line.
        UsageError: `columns` that fit no form, or the extra `data` is missing.
    """
    path, columns = Path(path), dict(columns or {})
    forms = _forms(task, columns)
    records = open_records(path)
    if records.paragraphs and columns:
        raise UsageError(f"{printable(str(path))} is plain text: it has no columns to map", hint="leave the map out")
    rows: list[Row] = []
    first: Form | None = None
    for line, values in records.pairs:
        record = _Record(place(path, line), values, columns, open=not records.table)
        form = record.fit(forms, first)
        row, first = _build(record, line, form), form
        if person_column is not None:
            row = replace(row, person=record.person(person_column))
        if rows and bool(row.messages) != bool(rows[0].messages):
            raise record.bad(
                "mixes turns and text", f"prompt and completion of the same kind as on line {rows[0].line}"
            )
        rows.append(row)
    if first is None:
        raise DataError(f"{printable(str(path))} holds no rows", expected="at least one row")
    found = Rows(path=path, task=task, form=first.name, rows=tuple(rows), paragraphs=records.paragraphs)
    if task == "causal-lm":
        return found
    return _number_labels(_labels_as_numbers(found, label2id or {}) if records.table else found, label2id or {})


def fingerprint(rows: Iterable[Row]) -> str:
    """Hash of what the rows hold: 64 hex digits, the same in any order and file format, other when a row is repeated.

    It is not salted: whoever can guess the rows can confirm the guess, so it stays on the data holder's machine.
    """
    whole = hashlib.blake2b(digest_size=32, person=b"splitfl rows")
    for digest in sorted(_digest(row) for row in rows):
        whole.update(digest)
    return whole.hexdigest()


def _digest(row: Row) -> bytes:
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in row.messages]
    label = None if row.label is None else str(row.label)
    content = (row.text, row.text_pair, row.prompt, row.completion, turns, row.answers_from, label)
    packed = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(packed.encode("ascii"), digest_size=32, person=b"splitfl row").digest()


def _forms(task: Task, columns: Mapping[str, str]) -> tuple[Form, ...]:
    forms = tuple(form for form in FORMS if form.task == task)
    if not forms:
        raise UsageError(f"there is no task {task!r}", hint=nearest(task, {form.task for form in FORMS}))
    allowed = {name for form in forms for name in form.need + form.may}
    for name in columns:
        if name not in allowed:
            raise UsageError(f"the column map names {name!r}, no field of {task} rows", hint=nearest(name, allowed))
    fitting = tuple(form for form in forms if columns.keys() <= {*form.need, *form.may})
    if not fitting:
        raise UsageError(f"no form of row has all of {', '.join(columns)}", expected=_one_of(forms))
    return fitting


def _one_of(forms: Iterable[Form]) -> str:
    return "; or ".join(form.says for form in forms)


@dataclass(frozen=True, slots=True, repr=False)
class _Record:
    """What the file holds in one place, read through the column map."""

    place: str
    values: Any
    columns: Mapping[str, str]
    open: bool
    """Whether keys may be named in an error; see the module's first lines."""

    def get(self, name: str) -> Any:
        return self.values.get(self.columns.get(name, name))

    def fit(self, forms: Sequence[Form], first: Form | None) -> Form:
        """The form of this record, which must be the one of the first."""
        if not isinstance(self.values, dict):
            raise self.bad(f"is a JSON {_kind(self.values)}", "one JSON object a line")
        form = next((form for form in forms if all(self.get(name) is not None for name in form.need)), None)
        if form is None or (first is not None and form is not first):
            before = " (the form of the rows before it)" if first else ""
            hint = None if first else "map the file's columns to these fields, for example prompt=question"
            raise self.bad(f"has {self._found()}", (first.says if first else _one_of(forms)) + before, hint)
        return form

    def _found(self) -> str:
        """Keys and types; a key that does not look like a name could be content."""
        known = _OUR_NAMES.union(self.columns.values())
        names = [key for key in self.values if key in known or (self.open and _KEY.fullmatch(key))][:_SHOWN_NAMES]
        parts = [f"{printable(key)} ({_kind(self.values[key])})" for key in names]
        if hidden := len(self.values) - len(names):
            parts.append("1 key that is not named here" if hidden == 1 else f"{hidden} keys that are not named here")
        return ", ".join(parts) or "no keys"

    def bad(self, problem: str, expected: str, hint: str | None = None) -> DataError:
        """The error for this place; it repeats the column map, which is the usual culprit."""
        renamed = ", ".join(f"{ours} from {theirs!r}" for ours, theirs in self.columns.items())
        hint = f"the column map takes {renamed}" if renamed else hint or "mend the row or take it out of the file"
        return DataError(f"{self.place}: the row {problem}", expected=expected, hint=hint)

    def text(self, name: str, value: Any, expected: str = "text that is not blank") -> str:
        """`value`, if it is a string that a tokenizer can use."""
        if not isinstance(value, str):
            raise self.bad(f"has a {name} of type {_kind(value)}", expected)
        if not value.strip():
            raise self.bad(f"has a blank {name}", expected)
        if not _is_unicode(value):
            raise self.bad(f"has half of a surrogate pair in {name}", "text that can be written as UTF-8")
        return value

    def person(self, column: str) -> str:
        """Whom the row belongs to."""
        value = self.values.get(column)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.bad(f"names no person in the column {printable(column)!r}", "a name or a number in every row")
        return str(value).strip()

    def turns(self, name: str) -> tuple[Turn, ...]:
        """A list of turns, kept whole: a chat template may read more than role and content."""
        value = self.get(name)
        if not isinstance(value, list) or not value:
            raise self.bad(
                f"has {name} of type {_kind(value)}{' without a turn' * (value == [])}", f"a list of {_TURN}"
            )
        for number, turn in enumerate(value, start=1):
            of = f"of turn {number} in {name}"
            if not isinstance(turn, dict):
                raise self.bad(f"has turn {number} in {name} of type {_kind(turn)}", _TURN)
            role = self.text(f"role {of}", turn.get("role"), _TURN)
            if role not in _MAY_BE_BLANK or turn.get("content") != "":
                self.text(f"content {of}", turn.get("content"), _TURN)
        return tuple(value)


def _kind(value: Any) -> str:
    return "null" if value is None else _TYPES.get(type(value), type(value).__name__)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _build(record: _Record, line: int, form: Form) -> Row:
    if form.task == "sequence-classification":
        pair = record.text("text_pair", record.get("text_pair")) if "text_pair" in form.need else None
        return Row(line=line, text=record.text("text", record.get("text")), text_pair=pair, label=_label(record))
    if form.name == "text":
        return Row(line=line, text=record.text("text", record.get("text")))
    if form.name == "messages":
        return _row_of_turns(record, line, record.turns("messages"), 0)
    if form.name == "instruction":
        parts = [record.text("instruction", record.get("instruction"))]
        parts += [record.text(name, record.get(name)) for name in _CONTEXT if not _is_blank(record.get(name))]
        return Row(line=line, prompt="\n\n".join(parts), completion=record.text(form.need[1], record.get(form.need[1])))
    if isinstance(record.get("prompt"), list):
        prompt = record.turns("prompt")
        return _row_of_turns(record, line, prompt + record.turns("completion"), len(prompt))
    prompt_text = record.text("prompt", record.get("prompt"))
    return Row(line=line, prompt=prompt_text, completion=record.text("completion", record.get("completion")))


def _row_of_turns(record: _Record, line: int, turns: tuple[Turn, ...], answers_from: int) -> Row:
    if not any(turn["role"] == "assistant" for turn in turns[answers_from:]):
        raise record.bad("has no turn to learn from", "at least one turn (of the completion) with the role 'assistant'")
    return Row(line=line, messages=turns, answers_from=answers_from)


def _label(record: _Record) -> int | str:
    label = record.get("label")
    if isinstance(label, int):  # booleans too: false is class 0, true is class 1
        return int(label)
    return record.text("label", label, "a whole number or a word").strip()


def _labels_as_numbers(rows: Rows, label2id: Mapping[str, int]) -> Rows:
    """A table holds words only: they are numbers if all of them are, and the model does not know them as words."""
    labels = {str(row.label) for row in rows}
    if not all(re.fullmatch(r"[0-9]{1,9}", label) for label in labels) or labels <= set(label2id):
        return rows
    return replace(rows, rows=tuple(replace(row, label=int(str(row.label))) for row in rows))


def _number_labels(rows: Rows, label2id: Mapping[str, int]) -> Rows:
    """Check every label against the model's classes, or number the labels where the model does not name its classes."""
    words = isinstance(rows[0].label, str)
    for row in rows:
        if isinstance(row.label, str) != words:
            problem = f"{rows.place(row)}: the label is {'no ' if words else 'a '}word, unlike that of the first row"
            raise DataError(problem, expected="labels that are all whole numbers, or all words")
    found: list[Any] = sorted({row.label for row in rows})
    named = set(label2id) != {f"LABEL_{number}" for number in range(len(label2id))}
    if words and not named:
        classes = {label: number for number, label in enumerate(found)}
        allowed = set(found[: len(label2id) or None])
        expected = f"at most {len(label2id)} different labels, one for each class of the model"
    elif label2id:
        classes, allowed = dict(label2id), set(label2id if words else label2id.values())
        expected = "one of the model's classes: " + ", ".join(printable(str(each)) for each in sorted(allowed)[:20])
    else:
        classes, allowed = {str(number): number for number in range(len(found))}, set(range(len(found)))
        expected = "class numbers that begin with 0 and leave no gap, or a model that names its classes"
    for row in rows:
        if row.label not in allowed:
            raise DataError(f"{rows.place(row)}: the label is none that the model can give", expected=expected)
    return replace(rows, label2id=classes)
