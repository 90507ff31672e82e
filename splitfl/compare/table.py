"""What a person sees on the terminal: one line a design."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from splitfl.compare.grid import Grid
from splitfl.compare.result import MONEY, OWNER_S, PARTY_S, TRIPS
from splitfl.compare.summary import Row
from splitfl.report import NO_VALUE, as_size

HEAD = ("design", "score", "gain kept", "best attack on the rows", "guessing", "bytes", "party", "owner", "trips",
        "money")  # fmt: skip


def print_table(rows: Sequence[Row], grid: Grid, *, console: Console | None = None) -> None:
    """One table a data set; a star marks the Pareto set."""
    console = console or Console()
    for data in dict.fromkeys(row.data for row in rows):
        mine = [row for row in rows if row.data == data]
        title = f"{data}: {grid.data[data].title}, {mine[0].metric}; * no other beats it in all of gain, attack, money"
        table = Table(*HEAD, title=title, title_justify="left")
        for row in mine:
            table.add_row(*cells(row))
        console.print(table)


def cells(row: Row) -> Iterator[str]:
    """The cells under `HEAD`."""
    figures = row.figures
    yield f"{'* ' if row.pareto else ''}{row.design}"
    yield score(row)
    yield NO_VALUE if row.kept is None else f"{100 * row.kept.mean:.0f} %"
    yield attack(row)
    yield NO_VALUE if row.best is None else f"{row.best.baseline:.2f}"
    yield as_size(int(row.bytes))
    yield f"{figures[PARTY_S]:.1f} s"
    yield f"{figures[OWNER_S]:.1f} s"
    yield f"{figures[TRIPS]:.0f}"
    yield f"{figures[MONEY]:.4f}"


def score(row: Row) -> str:
    """The score, with its range where there are several seeds."""
    if row.seeds == 1:
        return f"{row.score.mean:.3f}"
    return f"{row.score.mean:.3f} [{row.score.low:.3f}, {row.score.high:.3f}]"


def attack(row: Row) -> str:
    """The best attack, or why there is none."""
    best = row.best
    if best is None:
        return row.not_attacked or NO_VALUE
    beyond = "" if row.works else ", no better"
    return f"{best.name} {best.knowledge}: {best.metric} {best.value:.2f}{beyond}"
