"""The figures of ``splitfl bench aggregation`` and ``bench rounds``: at the terminal, and as a table of a page.

``python -m splitfl.bench.aggregation_table FILE... [--into PAGE]`` writes those of ``--json`` files as Markdown: to
standard output, or in the place of what stands between the two marks of the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitfl.bench.aggregation_goals import GOALS, kind_of, verdict
from splitfl.bench.marked import put_between, read_bench
from splitfl.bench.table import amount, by_case
from splitfl.errors import SplitflError
from splitfl.metrics import Result
from splitfl.report import NO_VALUE, as_size

BEGIN = "<!-- figures of splitfl bench aggregation and rounds: written by splitfl.bench.aggregation_table -->"
END = "<!-- end of the figures of aggregation and rounds -->"
COLUMNS = {"figure": 29, "measured": 12, "reference": 12, "ratio": 6, "reach": 9, "verdict": 6}  # with their widths
_COLOURS = {"met": "green", "missed": "red"}
_BUSY_BOUND = 0.1  # cores


def row(result: Result) -> tuple[str, ...]:
    """The cells of a figure, in the order of `COLUMNS`."""
    reach = NO_VALUE
    if result.reach is not None:
        goal = GOALS[kind_of(result.case), result.metric]
        said = amount(result.reach, result.unit) if goal.of == "value" else f"{result.reach:g}"
        reach = f"≤ {said}" if goal.of == "value" else f"≤ {said} x"
    return (
        result.metric,
        amount(result.value, result.unit),
        NO_VALUE if result.reference is None else amount(result.reference, result.unit),
        NO_VALUE if result.ratio is None else f"{result.ratio:.3f}",
        reach,
        verdict(result),
    )


def print_table(results: Sequence[Result]) -> None:
    """Print every figure on standard output, case by case."""
    if not results:
        return
    console = Console()
    for case, group in by_case(results):
        console.print(Text(case, style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        for column, width in COLUMNS.items():
            table.add_column(width=width, justify="left" if column in ("figure", "verdict") else "right")
        for *cells, judged in map(row, group):
            table.add_row(*map(Text, cells), Text(judged, style=_COLOURS.get(judged, "")))
        console.print(table)
    console.print(remark(results), highlight=False, markup=False, soft_wrap=True)


def remark(results: Sequence[Result]) -> str:
    """How many aims are reached, and what a reader must know of the run."""
    aimed = [verdict(result) for result in results if verdict(result)]
    said = f"{aimed.count('met')} of the {len(aimed)} figures with a reach are within it." if aimed else (
        "Too small to be compared with what is aimed at."
    )  # fmt: skip
    busy = [r.value for r in results if r.metric == "cores busy elsewhere" and isinstance(r.value, int | float)]
    if busy and max(busy) > _BUSY_BOUND:
        said += f" Other programs kept {max(busy):.1f} cores busy meanwhile."
    return said


# ---- a page


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Tables of the records, each under a line that says what it was measured on."""
    return "\n".join(map(_one, records))


def _one(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    results = [Result(**result) for result in record["results"]]
    lines = [
        f"`splitfl bench {record['settings']['name']}`: {machine['processor']}, {machine['cpu_count']} cores, "
        f"{as_size(machine['memory_bytes'])}; python {machine['python']}, splitfl {record['version']}.",
        "",
        "| case | " + " | ".join(COLUMNS) + " |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for case, group in by_case(results):
        for number, result in enumerate(group):
            lines.append(f"| {'' if number else case} | {' | '.join(row(result))} |")
    return "\n".join([*lines, "", remark(results), ""])


def read_record(path: Path) -> dict[str, Any]:
    """A ``--json`` file of one of the two benchmarks; see `splitfl.bench.marked.read_bench`."""
    return read_bench(path, ("aggregation", "rounds"))


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of `page`."""
    put_between(page, BEGIN, text, END)


def main(words: Sequence[str] | None = None) -> int:
    """Read the files, write the tables; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.aggregation_table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files of --json")
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
