"""What an owner keeps and shows: options of `splitfl serve`, and the commands that look at it. Nothing heavy here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from splitfl.config_common import NOT_EMPTY, PLAIN_NAME, JsonFile
from splitfl.errors import UsageError
from splitfl.options import Check, Panel, Settings, above
from splitfl.options.values import parse_address

KEEPING = Panel("What the owner keeps and shows (see docs/operation.md)")
_DAY = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])")


def parse_bind(text: str) -> tuple[str, int]:
    """Host and port of ``PORT``, ``HOST:PORT`` or ``[IPv6]:PORT``; a port alone is one of this machine's loopback.

    Raises:
        UsageError: it is neither.
    """
    host, port = parse_address(f"tcp://127.0.0.1:{text}" if text.isdecimal() else f"tcp://{text}")
    return "0.0.0.0" if host == "*" else host, port  # noqa: S104  asked for by name


def _is_bind(text: str) -> bool:
    try:
        parse_bind(text)
    except UsageError:
        return False
    return True


BIND = Check(test=_is_bind, expected="PORT or HOST:PORT; port 0 takes a free one")
DAY = Check(test=lambda text: bool(_DAY.fullmatch(text)), expected="a day such as 2026-11-30, in UTC")


@dataclass(frozen=True, kw_only=True)
class Keeping(Settings):
    """Options of `splitfl serve`."""

    state: Annotated[
        str | None,
        "Remember parties, sessions and usage: a SQLite file, or postgresql+psycopg://USER@HOST/NAME.",
        NOT_EMPTY,
        KEEPING,
    ] = None
    server_name: Annotated[str, "Name of this owner among several with one --state.", PLAIN_NAME, KEEPING] = "owner"
    metrics_bind: Annotated[
        str | None, "Show /metrics and /healthz at HOST:PORT, or at PORT of this machine alone.", BIND, KEEPING
    ] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], "How much to log.", KEEPING] = "info"
    log_format: Annotated[Literal["text", "json"], "Lines of text, or one JSON object a line.", KEEPING] = "text"
    log_file: Annotated[Path | None, "Append the log to this file instead of stderr.", KEEPING] = None

    def check_keeping(self) -> None:
        """Refuse a name that nothing would bear."""
        if self.server_name != "owner" and self.state is None:
            raise UsageError("--server-name has no effect without --state.", hint="add --state, or leave it out")


@dataclass(frozen=True, kw_only=True)
class StatusSettings(Settings):
    """Look at an owner: who is there, how fast it serves, what waits. From its metrics, or from its state."""

    address: Annotated[
        str | None, typer.Argument(help="HOST:PORT, or PORT, of `splitfl serve --metrics-bind`."), BIND
    ] = None
    state: Annotated[str | None, "Read the owner's state instead: parties, today's usage, budgets.", NOT_EMPTY] = None
    once: Annotated[bool, "Show it once instead of going on."] = False
    interval: Annotated[float, "Seconds between two looks.", above(0)] = 2.0
    json: JsonFile = None

    def check(self) -> None:
        """Refuse nothing to look at, or two things."""
        if (self.address is None) == (self.state is None):
            raise UsageError("Name either the owner's ADDRESS or its --state.", expected="exactly one of them")
        if self.json is not None and not self.once:
            raise UsageError("--json writes one look.", hint="add --once")


@dataclass(frozen=True, kw_only=True)
class UsageSettings(Settings):
    """What each party used, for billing: tokens, bytes, requests, sessions and their seconds."""

    state: Annotated[str, "The owner's state: what `splitfl serve --state` was given.", NOT_EMPTY]
    from_day: Annotated[
        str | None, typer.Option("--from", "--from-day", help="First day, in UTC. Default: since the start."), DAY
    ] = None
    to_day: Annotated[
        str | None, typer.Option("--to", "--to-day", help="Last day, in UTC, included. Default: today."), DAY
    ] = None
    by: Annotated[Literal["party", "day"], "One line a party, or one for each of its days."] = "party"
    csv: Annotated[Path | None, "Write the table to this file as CSV."] = None
    json: JsonFile = None

    def check(self) -> None:
        """Refuse days in the wrong order."""
        if self.from_day is not None and self.to_day is not None and self.from_day > self.to_day:
            raise UsageError(f"--from {self.from_day} is after --to {self.to_day}.")
