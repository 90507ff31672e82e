"""``python -m splitfl.compare.page OUT``: the tables in docs/compare.md, from a comparison's directory.

Writes docs/compare.json (a row a design, means over the seeds), the picture, and the section of docs/compare.md between
the two marks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import splitfl
from splitfl.compare.cells import plan_cells
from splitfl.compare.grid import SHIPPED, Grid, read_grid
from splitfl.compare.plots import cost_points, picture, privacy_points
from splitfl.compare.report import table_row
from splitfl.compare.result import Outcome, done_cells
from splitfl.compare.summary import summarise, verdict
from splitfl.config_compare import CompareSettings
from splitfl.errors import DataError, SplitflError, UsageError
from splitfl.files import replace_text
from splitfl.metrics import machine

BEGIN, END = "<!-- comparison: written by splitfl.compare.page, not by hand -->", "<!-- end of the comparison -->"
SUMMARY, PAGE, PICTURE = "compare.json", "compare.md", Path("images") / "compare.svg"
_HEAD = ("design", "gain kept", "points lost", "best attack", "guessing; beyond it", "bytes", "party", "owner", "money")
_KEYS = ("kept", "lost", "attack", "guessing", "size", "party", "owner", "money")
_MACHINE = ("processor", "cpu_count", "torch", "transformers")


def compact(outcomes: Sequence[Outcome], grid: Grid, *, quick: bool) -> dict[str, Any]:
    """What docs/compare.json holds."""
    rows = summarise(outcomes, grid)
    return {
        "version": splitfl.__version__,
        "machine": {name: value for name, value in machine().items() if name in _MACHINE},
        "quick": quick,
        "prices": vars(grid.prices),
        "seeds": sorted({outcome.seed for outcome in outcomes}),
        "verdict": verdict(rows, grid),
        "cells": len(outcomes),
        "failed": {f"{o.data}, {o.design}, seed {o.seed}": o.failed for o in outcomes if o.failed},
        "data": {
            data: {
                "title": grid.data[data].title,
                "metric": grid.data[data].metric,
                "rows": [
                    dict(table_row(row, number))
                    for number, row in enumerate((r for r in rows if r.data == data), start=1)
                ],
            }
            for data in dict.fromkeys(row.data for row in rows)
        },
    }


def section(record: Mapping[str, Any]) -> Iterator[str]:
    """The section as Markdown, from docs/compare.json."""
    prices = record["prices"]
    yield ""
    size = "quick rows and steps" if record["quick"] else "whole size"
    yield f"{record['cells']} cells at the grid's {size}, seeds {', '.join(map(str, record['seeds']))};"
    yield f"{record['machine']['processor']}, {record['machine']['cpu_count']} cores. Prices:"
    yield f"{prices['cpu_hour']:g} {prices['currency']} a core hour, {prices['gigabyte']:g} a gigabyte."
    yield ""
    yield f"**{record['verdict']}**"
    yield ""
    yield f"![Utility against privacy and cost]({PICTURE.as_posix()})"
    yield ""
    yield "Numbers are places in the tables; filled points and stars are the Pareto set; the dotted line is 95 % of"
    yield "full LoRA's gain."
    for name, data in record["data"].items():
        yield ""
        yield f"### {name}: {data['title']} ({data['metric']})"
        yield ""
        yield "| " + " | ".join(_HEAD) + " |"
        yield "|" + "---|" * len(_HEAD)
        for row in data["rows"]:
            star = "★ " if row["pareto"] else ""
            closed = " (closed)" if row["closed"] else ""
            yield "| " + " | ".join([f"{star}`{row['design']}`{closed}", *(_cell(row[key]) for key in _KEYS)]) + " |"
    if record["failed"]:
        yield ""
        yield "Failed: " + "; ".join(f"{name}: {why}" for name, why in record["failed"].items()) + "."
    yield ""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")


def filled(page: str, record: Mapping[str, Any]) -> str:
    """The page with the section between its marks.

    Raises:
        DataError: it has not both marks, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"The page has no place for the comparison: {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n" + "\n".join(section(record)) + f"\n{END}{after}"


def write_page(out: Path, grid: Grid, docs: Path, *, quick: bool) -> None:
    """Write summary, picture and section into `docs`.

    Raises:
        UsageError: the directory holds no cell of the grid; matplotlib is missing.
        DataError: a result that cannot be read, or a page without a place for the section.
    """
    cells = plan_cells(grid, CompareSettings(quick=quick))
    done = done_cells(cells, {cell.name: cell.digest(grid) for cell in cells}, out)
    outcomes = [done[cell.name] for cell in cells if cell.name in done]
    if not outcomes:
        raise UsageError(f"{out} holds no cell of {grid.path}.", hint="is it one of --quick? Then say so")
    record = compact(outcomes, grid, quick=quick)
    page = docs / PAGE
    text = filled(page.read_text(encoding="utf-8"), record)
    rows = summarise(outcomes, grid)
    panels = []
    for data in record["data"]:
        mine = [row for row in rows if row.data == data]
        shown = [(row, number) for number, row in enumerate(mine, start=1) if not row.is_reference]
        both = [row for row, _ in shown], [number for _, number in shown]
        panels.append((data, privacy_points(*both), cost_points(*both)))
    picture(panels, docs / PICTURE, "none")
    replace_text(docs / SUMMARY, json.dumps(record, indent=1) + "\n")
    replace_text(page, text)


def main(words: Sequence[str] | None = None) -> int:
    """Read the cells, write the page; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.compare.page", description=__doc__)
    parser.add_argument("out", type=Path, help="the --out of `splitfl compare`")
    parser.add_argument("--grid", type=Path, default=SHIPPED, help="its grid file")
    parser.add_argument("--quick", action="store_true", help="cells of --quick")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    given = parser.parse_args(words)
    try:
        write_page(given.out, read_grid(given.grid), given.docs, quick=given.quick)
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
