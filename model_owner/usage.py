"""`splitfl usage`: what each party used, for billing, from the owner's state."""

from __future__ import annotations

import csv
import io
import time

from rich.console import Console
from rich.table import Table

from model_owner.state.database import Database
from model_owner.state.reading import SUMMED, Usage, usage
from splitfl.config_owner import UsageSettings
from splitfl.files import replace_text
from splitfl.metrics import Result, write_results
from splitfl.report import as_size

UNITS = {
    "sessions": "sessions", "session_seconds": "seconds", "tokens_forward": "tokens", "tokens_backward": "tokens",
    "tokens_decode": "tokens", "bytes_in": "bytes", "bytes_out": "bytes", "requests": "requests", "steps": "steps",
}  # fmt: skip
"""Of each column."""


def export_usage(settings: UsageSettings) -> None:
    """Write the table where it was asked for, or print it.

    Raises:
        ResourceError, DataError, UsageError: the state cannot be read.
    """
    with Database(settings.state, write=False) as database:
        lines = usage(database, settings.from_day, settings.to_day, by_day=settings.by == "day")
    if settings.csv is not None:
        replace_text(settings.csv, as_csv(lines))
    if settings.json is not None:
        write_results(settings.json, "usage", settings, results_of(lines))
    if settings.csv is None and settings.json is None:
        Console().print(_as_table(lines, settings))


def as_csv(lines: list[Usage]) -> str:
    """One line a party, or a party and day; seconds with three digits, all else whole numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    days = any(line.day is not None for line in lines)
    writer.writerow(["party", *(["day"] if days else []), *SUMMED])
    for line in lines:
        writer.writerow([line.party, *([line.day] if days else []), *(_shown(line, name) for name in SUMMED)])
    return out.getvalue()


def results_of(lines: list[Usage]) -> list[Result]:
    """The same as figures; a case is a party, or a party and a day."""
    return [
        Result(
            case=line.party if line.day is None else f"{line.party} {line.day}",
            metric=name, value=line.sums[name], unit=UNITS[name],
        )
        for line in lines
        for name in SUMMED
    ]  # fmt: skip


def _shown(line: Usage, name: str) -> str:
    return f"{line.sums[name]:.3f}" if name == "session_seconds" else str(line.sums[name])


def _as_table(lines: list[Usage], settings: UsageSettings) -> Table:
    """The figures a person looks for; all of them are in the files."""
    until = settings.to_day or time.strftime("%Y-%m-%d", time.gmtime())
    table = Table(title=f"{settings.from_day or 'the start'} to {until} (UTC)", title_justify="left", box=None)
    days = settings.by == "day"
    for name in ("party", *(["day"] if days else [])):
        table.add_column(name, no_wrap=True)
    for name in ("sessions", "hours", "tokens", "steps", "in", "out"):
        table.add_column(name, justify="right")
    for line in lines:
        sums = line.sums
        tokens = sum(value for name, value in sums.items() if name.startswith("tokens_"))
        table.add_row(
            line.party, *([line.day or ""] if days else []), f"{sums['sessions']:,}",
            f"{sums['session_seconds'] / 3600:,.2f}", f"{tokens:,}", f"{sums['steps']:,}",
            as_size(round(sums["bytes_in"])), as_size(round(sums["bytes_out"])),
        )  # fmt: skip
    return table
