"""The figures of a benchmark as people read them: their words, the table at the terminal, the verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitfl.bench.cases import BUSY, RATE, REACHES, STEP, verdict
from splitfl.metrics import Result
from splitfl.report import NO_VALUE, as_number, as_size

COLUMNS = {"figure": 25, "split": 15, "reference": 15, "ratio": 6, "reach": 6, "verdict": 7}  # with their widths
_BUSY_BOUND = 0.1  # cores; beyond this a ratio says more about the machine's other work
_COLOURS = {"met": "green", "missed": "red"}


def print_table(results: Sequence[Result]) -> None:
    """Print every figure on standard output, case by case, and what a reader must know of the run."""
    if not results:
        return
    console = Console()
    console.print(_table([tuple(COLUMNS)], style="dim"))
    for case, group in by_case(results):
        console.print(Text(case, style="bold"))
        console.print(_table([row(result) for result in group]))
    for remark in remarks(results):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[tuple[str, ...]], style: str = "") -> Table:
    """Rows without lines; tables that are printed below each other line up, and leave room for a heading between."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), style=style)
    for column, width in COLUMNS.items():
        table.add_column(width=width, justify="left" if column in ("figure", "verdict") else "right")
    for *cells, judged in rows:
        table.add_row(*map(Text, cells), Text(judged, style=_COLOURS.get(judged, "")))
    return table


def by_case(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    """The figures of each case, in the order in which they were measured."""
    return [(case, list(group)) for case, group in groupby(results, key=lambda result: result.case)]


def has_speed(group: Iterable[Result]) -> bool:
    """Whether the figures of a case hold the speed that it is about."""
    return any(result.metric in (STEP, RATE) for result in group)


def row(result: Result) -> tuple[str, ...]:
    """The cells of one figure, in the order of `COLUMNS`."""
    reach = NO_VALUE
    if result.reach is not None:
        reach = f"{'≥' if REACHES[result.metric].at_least else '≤'} {result.reach:g}"
    return (
        result.metric,
        amount(result.value, result.unit),
        NO_VALUE if result.reference is None else amount(result.reference, result.unit),
        NO_VALUE if result.ratio is None else f"{result.ratio:.3f}",
        reach,
        verdict(result),
    )


def amount(value: float | str | None, unit: str) -> str:
    """A figure with its unit; bytes in powers of 1000."""
    if not isinstance(value, int | float):
        return NO_VALUE if value is None else value
    if unit == "bytes":
        return as_size(value)
    number = "0" if value == 0 else as_number(value)
    return f"{number} {unit}".rstrip()


def in_words(results: Iterable[Result]) -> str:
    """The main figure of a case, in one line."""
    for result in results:
        if result.metric in (STEP, RATE) and result.ratio is not None:
            split, whole = amount(result.value, result.unit), amount(result.reference, result.unit)
            return f"{split} against {whole}, ratio {result.ratio:.3f}"
    return "split and monolith did not compute the same: no speed"


def remarks(results: Sequence[Result]) -> list[str]:
    """What a reader of the table must know of this run."""
    said = []
    aimed = [verdict(result) for result in results if verdict(result)]
    if aimed:
        said.append(f"{aimed.count('met')} of the {len(aimed)} figures with a reach are within it.")
    busy = [r for r in results if r.metric == BUSY and isinstance(r.value, int | float) and r.value > _BUSY_BOUND]
    if busy:
        said.append(
            f"Other programs kept more than {_BUSY_BOUND:g} of a core busy in {len(busy)} cases: their ratios say "
            "little. Measure them again on a quiet machine."
        )
    return said
