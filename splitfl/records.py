"""Step 1 of the journey, first of four: a file -> numbered records, nothing known yet about what they mean.

Reads JSON Lines, CSV, TSV and plain text (each also as ``.gz``) and directories saved by the `datasets` library. Errors
name file and line and never show content, nor keep it as their cause: a traceback printed with its causes stays clean.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.errors import DataError, UsageError, printable

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_ENDINGS = "a name ending in .jsonl, .ndjson, .json (one object a line), .csv, .tsv or .txt, each also with .gz"


@dataclass(frozen=True, slots=True)
class Records:
    """Pairs of place (line of the file or row of the saved data set, from 1) and record, read as they are asked for."""

    pairs: Iterator[tuple[int, Any]]
    table: bool = False
    """CSV or TSV: every value is text, and the keys come from a first line that may not be a header at all."""
    paragraphs: bool = False
    """Plain text: each record is a paragraph under the key `text`."""


def place(path: Path, line: int) -> str:
    """`file:line`, safe to print."""
    return f"{printable(str(path))}:{line}"


def open_records(path: Path) -> Records:
    """Choose the reader by the name's ending; a directory is a saved data set, ``dir:split`` one split of it.

    Raises:
        DataError: nothing there, or of no kind that is read here; while reading: the first line that cannot be read.
        UsageError: while reading: a directory, and the `datasets` library is missing.
    """
    where = printable(str(path))
    base, colon, split = path.name.rpartition(":")
    if path.is_dir():
        return Records(_saved(path, None))
    if not path.exists() and colon and base and path.with_name(base).is_dir():
        return Records(_saved(path.with_name(base), split))
    if not path.exists():
        raise DataError(f"there is no file {where}", expected="a file of rows, or a saved data set")
    match Path(path.name.removesuffix(".gz")).suffix.lower():
        case ".jsonl" | ".ndjson" | ".json":
            return Records(_json_lines(path))
        case ".csv":
            return Records(_table(path, ","), table=True)
        case ".tsv":
            return Records(_table(path, "\t"), table=True)
        case ".txt":
            return Records(_paragraphs(path), paragraphs=True)
    raise DataError(f"{where} has an ending that is not read here", expected=f"{_ENDINGS}; or a saved data set")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line, without its end. Only ``\\n`` and ``\\r\\n`` end a line, as in JSON Lines."""
    fault = ""
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1 and raw.startswith(_UTF16_BOMS):
                    problem = f"{place(path, 1)}: the file is UTF-16"
                    raise DataError(problem, expected="UTF-8 text", hint="save the file as UTF-8")
                text = _decoded(raw.removeprefix(_UTF8_BOM))
                if text is None:
                    problem = f"{place(path, number)}: the line is not UTF-8"
                    raise DataError(problem, expected="UTF-8 text", hint="save the file as UTF-8")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        fault = "is not a whole gzip file"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    if fault:
        raise DataError(f"{printable(str(path))} {fault}", expected="a file of rows that can be read")


def _decoded(raw: bytes) -> str | None:
    # Answers instead of raising: a UnicodeDecodeError holds the bytes of the row.
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _parsed(text: str) -> tuple[Any, int]:
    """The JSON value and 0, or None and the column of the fault; a JSONDecodeError holds the row, so it answers too."""
    try:
        return json.loads(text), 0
    except json.JSONDecodeError as error:
        return None, error.colno
    except (ValueError, RecursionError):
        return None, 1


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, text in _lines(path):
        if not text.strip():
            continue
        value, column = _parsed(text)
        if column:
            problem = f"{place(path, number)}: the line is not JSON; the fault is at column {column}"
            hint = "write a list as one object a line: `jq -c '.[]'` does" if text.lstrip().startswith("[") else None
            raise DataError(problem, expected="one JSON object a line", hint=hint)
        yield number, value


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    header: list[str] = []
    for line, cells in _cells(path, delimiter):
        if not any(cell.strip() for cell in cells):
            continue
        fault = ""
        if not header:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                fault = "two columns of the header have the same name"
        elif len(cells) != len(header):
            fault = f"the row has {len(cells)} cells, the header has {len(header)}"
        else:
            yield line, dict(zip(header, cells, strict=True))
        if fault:
            raise DataError(f"{place(path, line)}: {fault}", expected="a header, then as many cells in every row")


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the line where it begins: a quoted cell may run over several lines."""
    table = csv.reader((f"{text}\n" for _, text in _lines(path)), delimiter=delimiter, strict=True)
    fault: str | None = None
    line = 1
    try:
        for cells in table:
            yield line, cells
            line = table.line_num + 1
    except csv.Error as error:
        fault = str(error)
    if fault:
        problem = f"{place(path, line)}: the row is not well-formed: {printable(fault)}"
        raise DataError(
            problem,
            expected="quotes around cells that hold a separator, a line end or a (doubled) quote",
            hint="JSON Lines has none of these traps",
        )


def _paragraphs(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    held: list[str] = []
    begins = 0
    for number, text in _lines(path):
        if text.strip():
            begins = begins if held else number
            held.append(text)
        elif held:
            yield begins, {"text": "\n".join(held)}
            held = []
    if held:
        yield begins, {"text": "\n".join(held)}


def _saved(path: Path, split: str | None) -> Iterator[tuple[int, Any]]:
    where = printable(str(path))
    try:
        import datasets
    except ImportError:
        problem = f"{where} is a directory: reading a saved data set needs the datasets library"
        raise UsageError(problem, hint="pip install 'splitfl[data]'") from None
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        problem = f"{where} is not a data set saved with save_to_disk ({type(error).__name__})"
        raise DataError(problem, expected=f"a saved data set, or a file: {_ENDINGS}") from None
    if isinstance(found, datasets.DatasetDict):
        name = split or "train"
        if name not in found:
            names = ", ".join(printable(each) for each in found)
            problem = f"{where} has no split {printable(name)!r}"
            raise DataError(problem, expected=f"one of {names}", hint=f"name it after a colon: {where}:NAME")
        found = found[name]
    elif split is not None:
        raise DataError(f"{where} is one data set, without splits", hint="leave out the colon and the name after it")
    yield from enumerate(found, start=1)
