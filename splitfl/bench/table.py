"""The figures of a benchmark as people read them: a table at the terminal, the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from splitfl.bench.cases import BYTES, PARTY_MEMORY, RATE, REACHES, STEP, verdict
from splitfl.metrics import Result
from splitfl.report import NO_VALUE, as_number, as_size

COLUMNS = ("case", "figure", "split", "reference", "ratio", "reach", "verdict")
_BUSY = "cores busy elsewhere"
_BUSY_BOUND = 0.1  # beyond this a ratio says more about the machine's other work


def print_table(results: Sequence[Result]) -> None:
    """Print every figure on standard output; a case's name stands once."""
    if not results:
        return
    table = Table(title="splitfl bench split: the split against plain PEFT in one process", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("case", "figure", "verdict") else "right")
    last = None
    for result in results:
        if last not in (None, result.case):
            table.add_section()
        colour = {"met": "green", "missed": "red"}.get(verdict(result), "")
        cells = row(result)
        table.add_row(
            cells[0] if result.case != last else "", *cells[1:-1], f"[{colour}]{cells[-1]}[/]" if colour else ""
        )
        last = result.case
    console = Console()
    console.print(table)
    for remark in remarks(results):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)


def row(result: Result) -> tuple[str, ...]:
    """The cells of one figure, in the order of `COLUMNS`."""
    reach = NO_VALUE
    if result.reach is not None:
        sign = "at least" if REACHES[result.metric].at_least else "at most"
        reach = f"{sign} {result.reach:g}"
    return (
        result.case,
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
    return as_size(value) if unit == "bytes" else f"{as_number(value)} {unit}".rstrip()


def in_words(results: Iterable[Result]) -> str:
    """The main figure of a case, in one line."""
    for result in results:
        if result.metric in (STEP, RATE) and result.ratio is not None:
            split, whole = amount(result.value, result.unit), amount(result.reference, result.unit)
            return f"{split} against {whole}, ratio {result.ratio:.3f} {verdict(result)}".rstrip()
    return "; ".join(f"{result.metric} {amount(result.value, result.unit)}" for result in results)


def remarks(results: Sequence[Result]) -> list[str]:
    """What a reader of the table must know of this run."""
    said = []
    aimed = [verdict(result) for result in results if verdict(result)]
    if aimed:
        said.append(f"{aimed.count('met')} of {len(aimed)} figures that something is aimed at reach it.")
    busy = [r.case for r in results if r.metric == _BUSY and isinstance(r.value, float) and r.value > _BUSY_BOUND]
    if busy:
        said.append(
            f"Something else kept more than {_BUSY_BOUND:g} of a core busy during {len(busy)} cases: "
            "their ratios say less. Measure again on a quiet machine."
        )
    return said


def main_figures() -> tuple[str, ...]:
    """The metrics that something is aimed at, in the order in which a page shows them."""
    return (STEP, BYTES, PARTY_MEMORY, RATE)
