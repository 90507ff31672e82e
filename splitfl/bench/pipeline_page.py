"""The figures of ``splitfl bench pipeline`` and ``link`` as a table of a page.

``python -m splitfl.bench.pipeline_page FILE... [--into PAGE]`` writes those of ``--json`` files as Markdown: to
standard output, or in the place of what stands between the two marks of the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfl.bench.cases import REACHES, verdict
from splitfl.bench.marked import put_between, read_bench
from splitfl.bench.table import amount, by_case, remarks
from splitfl.errors import SplitflError
from splitfl.metrics import Result
from splitfl.report import NO_VALUE, as_size

BEGIN = "<!-- figures of splitfl bench pipeline and link: written by splitfl.bench.pipeline_page -->"
END = "<!-- end of the figures of pipeline and link -->"
_COLUMNS = ("case", "figure", "measured", "reference", "ratio", "reach", "verdict")


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """One table for each ``--json`` record, under a line that says what it was measured on."""
    return "\n".join(map(_one, records))


def read_record(path: Path) -> dict[str, Any]:
    """A ``--json`` file of one of the two benchmarks; see `splitfl.bench.marked.read_bench`."""
    return read_bench(path, ("pipeline", "link"))


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of `page`."""
    put_between(page, BEGIN, text, END)


def _one(record: Mapping[str, Any]) -> str:
    results = [Result(**result) for result in record["results"]]
    machine, settings = record["machine"], record["settings"]
    lines = [
        f"`splitfl bench {settings['name']}`: {machine['processor']}, {machine['cpu_count']} cores, "
        f"{as_size(machine['memory_bytes'])}; torch {machine['torch']}, splitfl {record['version']}; "
        f"medians of {settings['steps']} repetitions.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"| {' | '.join(['---', '---', *['---:'] * 4, '---'])} |",
    ]
    for case, group in by_case(results):
        lines += [_row(case if result is group[0] else "", result) for result in group]
    return "\n".join([*lines, "", *(f"{remark}\n" for remark in remarks(results))])


def _row(case: str, result: Result) -> str:
    reach = NO_VALUE
    if result.reach is not None:
        reach = f"{'≥' if REACHES[result.metric].at_least else '≤'} {result.reach:g}"
    cells = (
        case,
        result.metric,
        amount(result.value, result.unit),
        NO_VALUE if result.reference is None else amount(result.reference, result.unit),
        NO_VALUE if result.ratio is None else f"{result.ratio:.3f}",
        reach,
        verdict(result),
    )
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> int:
    """Read the files, write the tables; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.pipeline_page", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files that the two benchmarks wrote with --json")
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
