"""The figures of ``splitfl bench split --json`` as Markdown: ``python -m splitfl.bench.page FILE... [--into PAGE]``.

Without ``--into`` the tables go to standard output; with it they replace what stands between the two marks of the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfl.bench.cases import BUSY, BYTES, PARTY_MEMORY, RATE, STEP, verdict
from splitfl.bench.table import amount, by_case, remarks
from splitfl.errors import DataError, SplitflError
from splitfl.files import replace_text
from splitfl.metrics import Result
from splitfl.report import NO_VALUE, as_size

BEGIN = "<!-- figures of splitfl bench split: written by splitfl.bench.page, not by hand -->"
END = "<!-- end of the figures -->"

_TRAINING = ("case", "monolith", "split", "ratio", "middle half", "bytes / formula", "party's memory / monolith's",
             "within reach")  # fmt: skip
_GENERATION = ("case", "monolith", "split", "ratio", "middle half", "equal tokens", "within reach")


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Tables of one or more ``--json`` records, each under a line that says what it was measured on."""
    return "\n".join(_one(record) for record in records)


def read_record(path: Path) -> dict[str, Any]:
    """A ``--json`` file of the benchmark.

    Raises:
        DataError: it cannot be read, or is of another command.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = (record["command"], record["settings"]["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of figures ({type(error).__name__}).") from error
    if found != ("bench", "split"):
        raise DataError(f"{path} holds other figures.", expected="a file that `splitfl bench split --json` wrote")
    return dict(record)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of `page`.

    Raises:
        DataError: the page has no such marks.
    """
    old = page.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{page} has no place for figures.", expected=f"the lines {BEGIN} and {END}")
    replace_text(page, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def _one(record: Mapping[str, Any]) -> str:
    results = [Result(**result) for result in record["results"]]
    parts = [_circumstances(record)]
    for columns, main in ((_TRAINING, STEP), (_GENERATION, RATE)):
        rows = [_row(columns, case, group, main) for case, group in by_case(results) if _has(group, main)]
        if rows:
            parts.append(_table(columns, rows))
    parts += [f"{remark}\n" for remark in remarks(results)]
    return "\n".join(parts)


def _circumstances(record: Mapping[str, Any]) -> str:
    machine, settings = record["machine"], record["settings"]
    return (
        f"{machine['processor']}, {machine['cpu_count']} cores, {as_size(machine['memory_bytes'])}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, splitfl {record['version']}; "
        f"{settings['dtype']}, medians of {settings['steps']} repetitions.\n"
    )


def _has(group: Sequence[Result], metric: str) -> bool:
    return any(result.metric == metric for result in group)


def _row(columns: Sequence[str], case: str, group: Sequence[Result], main: str) -> list[str]:
    found = {result.metric: result for result in group}
    first = found[main]
    cells = {
        "case": case,
        "monolith": amount(first.reference, first.unit),
        "split": amount(first.value, first.unit),
        "ratio": _ratio(first),
        "middle half": str(found["middle half of the ratios"].value),
        "bytes / formula": _ratio(found.get(BYTES)),
        "party's memory / monolith's": _ratio(found.get(PARTY_MEMORY)),
        "equal tokens": _share(found.get("equal tokens")),
        "within reach": _judged(group),
    }
    return [cells[column] for column in columns]


def _ratio(result: Result | None) -> str:
    return NO_VALUE if result is None or result.ratio is None else f"{result.ratio:.3f}"


def _share(result: Result | None) -> str:
    return NO_VALUE if result is None else f"{result.value} of {result.reference}"


def _judged(group: Sequence[Result]) -> str:
    """Yes, or what is missed; a busy machine is said too."""
    judged = [result for result in group if verdict(result)]
    missed = [result.metric for result in judged if verdict(result) == "missed"]
    busy = next((r.value for r in group if r.metric == BUSY), 0)
    words = (f"no: {', '.join(missed)}" if missed else "yes") if judged else NO_VALUE
    return f"{words} (busy machine)" if isinstance(busy, float) and busy > 0.1 else words


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 2) + ["---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Read the files, write the tables; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.page", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files that `splitfl bench split --json` wrote")
    parser.add_argument("--into", type=Path, help="a page with the two marks")
    given = parser.parse_args(words)
    try:
        text = markdown([read_record(path) for path in given.files])
        if given.into is None:
            print(text)
        else:
            put_into(given.into, text)
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
