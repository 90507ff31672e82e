"""`splitfl status`: an owner at a glance, from its metrics (while it runs) or from its state (also when it does not).

Nothing is asked of the owner but its `/metrics`, so looking costs it no more than a scrape does.
"""

from __future__ import annotations

import contextlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from splitfl.config_owner import StatusSettings, parse_bind
from splitfl.errors import ResourceError, UnreachableError, WireError
from splitfl.metrics import Result, write_results
from splitfl.report import as_size

_TIMEOUT_S = 5.0
_MOST_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one look found: figures of the owner, and of each party, with their units."""

    moment: float
    """Seconds, of a clock that never runs backwards."""
    whole: dict[str, tuple[float, str]]
    parties: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)


def status(settings: StatusSettings) -> None:
    """Show it once, or until Ctrl-C.

    Raises:
        UnreachableError, WireError: nobody answers there, or something else does.
        ResourceError, DataError, UsageError: the state cannot be read.
    """
    with _looker(settings) as look:
        if settings.once:
            figures = look()
            if settings.json is not None:
                write_results(settings.json, "status", settings, results_of(figures))
            else:
                Console().print(screen(figures, None))
            return
        _go_on(look, settings.interval)


def _go_on(look: Callable[[], Figures], interval: float) -> None:
    figures = look()
    with contextlib.suppress(KeyboardInterrupt), Live(screen(figures, None), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            before = figures
            try:
                figures = look()
            except UnreachableError as error:  # it may be restarting
                live.update(Group(screen(figures, before), Text(error.problem, style="red")), refresh=True)
            else:
                live.update(screen(figures, before), refresh=True)


@contextlib.contextmanager
def _looker(settings: StatusSettings) -> Iterator[Callable[[], Figures]]:
    if settings.address is not None:
        host, port = parse_bind(settings.address)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        yield lambda: from_metrics(fetch(url))
        return
    from model_owner.state.database import Database

    assert settings.state is not None  # noqa: S101  `StatusSettings.check` saw to it
    with Database(settings.state, write=False) as database:
        yield lambda: from_state(database)


def fetch(url: str) -> str:
    """The text at an owner's ``/metrics``.

    Raises:
        UnreachableError: nobody answers.
        WireError: something else does.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not reach this machine
    try:
        with direct.open(url, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise WireError(f"{url} answers with status {error.code}.", expected="an owner's metrics") from error
    except OSError as error:
        raise UnreachableError(
            f"Nobody answers at {url}.", hint="look at what `splitfl serve --metrics-bind` printed"
        ) from error
    except http.client.HTTPException as error:
        raise WireError(
            f"What answers at {url} does not speak HTTP.",
            expected="the address of --metrics-bind, not that of --bind",
        ) from error
    return content.decode("utf-8", "replace")


WHOLE = {
    "splitfl_sessions_open": ("sessions open", "sessions"),
    "splitfl_tokens_total": ("tokens", "tokens"),
    "splitfl_requests_total": ("requests", "requests"),
    "splitfl_refusals_total": ("refusals", "refusals"),
    "splitfl_queue_requests": ("requests waiting", "requests"),
    "splitfl_queue_bytes": ("bytes under way", "bytes"),
    "splitfl_queue_seconds_sum": ("queue seconds", "seconds"),
    "splitfl_step_seconds_sum": ("step seconds", "seconds"),
    "splitfl_step_seconds_count": ("pieces of work", "pieces"),
    "splitfl_memory_used_bytes": ("memory used", "bytes"),
    "splitfl_memory_limit_bytes": ("memory budget", "bytes"),
    "splitfl_resident_bytes": ("resident", "bytes"),
    "splitfl_draining": ("draining", "0 or 1"),
    "splitfl_state_failing": ("state failing", "0 or 1"),
}
"""Sample to what it is called here, and its unit; labels are added up."""
PARTY = {
    "splitfl_party_tokens_total": ("tokens", "tokens"),
    "splitfl_sessions_opened_total": ("sessions opened", "sessions"),
    "splitfl_budget_spent_tokens": ("budget spent", "tokens"),
    "splitfl_budget_total_tokens": ("budget", "tokens"),
}
COUNTING = ("tokens", "requests", "refusals", "queue seconds", "step seconds", "pieces of work")
"""Those that only grow: a live view shows how fast."""


def from_metrics(text: str) -> Figures:
    """Figures from an owner's ``/metrics``.

    Raises:
        WireError: it is no owner's.
        ResourceError: prometheus-client is missing.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise ResourceError("Reading metrics needs prometheus-client.", hint="pip install 'splitfl[owner]'") from error
    whole: dict[str, tuple[float, str]] = {}
    parties: dict[str, dict[str, tuple[float, str]]] = {}
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError:
        samples = []
    for sample in samples:
        if sample.name in WHOLE:
            name, unit = WHOLE[sample.name]
            whole[name] = whole.get(name, (0.0, unit))[0] + sample.value, unit
        if sample.name in PARTY:
            name, unit = PARTY[sample.name]
            parties.setdefault(sample.labels.get("party", ""), {})[name] = sample.value, unit
    if "sessions open" not in whole:
        raise WireError("What answers there is no owner's metrics.", expected="splitfl_sessions_open among them")
    return Figures(moment=time.monotonic(), whole=whole, parties=dict(sorted(parties.items())))


def from_state(database: object) -> Figures:
    """Figures from an owner's state.

    Raises:
        ResourceError, DataError: it cannot be read.
    """
    from model_owner.state.database import Database
    from model_owner.state.pending import day_of
    from model_owner.state.reading import parties

    assert isinstance(database, Database)  # noqa: S101
    known = parties(database, day_of(time.time()))
    rows: dict[str, dict[str, tuple[float, str]]] = {}
    for party in known:
        today = party.today
        served = sum(today[f"tokens_{work}"] for work in ("forward", "backward", "decode"))
        rows[party.party] = {
            "sessions open": (party.open_sessions, "sessions"),
            "tokens today": (served, "tokens"),
            "steps today": (today["steps"], "steps"),
            "bytes in today": (today["bytes_in"], "bytes"),
            "bytes out today": (today["bytes_out"], "bytes"),
            "budget spent": (party.spent_tokens, "tokens"),
            "last seen": (party.last_seen, "seconds since 1970"),
        }
    totals = ("sessions open", "tokens today", "steps today")
    whole = {
        name: (sum(row[name][0] for row in rows.values()), rows[known[0].party][name][1]) if known else (0.0, "")
        for name in totals
    }
    return Figures(moment=time.monotonic(), whole={"parties": (len(known), "parties")} | whole, parties=rows)


def results_of(figures: Figures) -> list[Result]:
    """The figures in the shape that `--json` has everywhere."""
    cases = {"owner": figures.whole} | {f"party {name}": row for name, row in figures.parties.items()}
    return [
        Result(case=case, metric=name, value=value, unit=unit)
        for case, row in cases.items()
        for name, (value, unit) in row.items()
    ]


# ---- the screen


def screen(figures: Figures, before: Figures | None) -> RenderableType:
    """What a person sees; rates come from the look before, if there was one."""
    rates = _rates(figures.whole, before.whole if before else None, figures, before)
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, (value, unit) in figures.whole.items():
        rate = rates.get(name)
        facts.add_row(name, _words(value, unit), "" if rate is None else f"{_words(rate, unit)}/s")
    rows = Table(box=None, pad_edge=False)
    rows.add_column("party")
    columns = list(dict.fromkeys(name for row in figures.parties.values() for name in row))
    for name in columns:
        rows.add_column(name, justify="right")
    rows.add_column("tokens/s", justify="right")
    for party, row in figures.parties.items():
        own = _rates(row, before.parties.get(party, {}) if before else None, figures, before)
        shown = (_words(*row[name]) if name in row else "" for name in columns)
        rows.add_row(party, *shown, f"{own['tokens']:,.0f}" if "tokens" in own else "")
    state = "draining" if figures.whole.get("draining", (0, ""))[0] else "serving"
    head = Text(state if "draining" in figures.whole else "from its state", style="bold")
    return Group(head, facts, Text(""), rows)


def _rates(
    row: dict[str, tuple[float, str]], earlier: dict[str, tuple[float, str]] | None, now: Figures,
    before: Figures | None,
) -> dict[str, float]:  # fmt: skip
    """A second, for what only grows; after a restart of the owner a count is smaller, and there is no rate."""
    if earlier is None or before is None or now.moment <= before.moment:
        return {}
    nothing = (0.0, "")  # what was never counted is not shown at all
    return {
        name: (value - earlier.get(name, nothing)[0]) / (now.moment - before.moment)
        for name, (value, _) in row.items()
        if name in COUNTING and value >= earlier.get(name, nothing)[0]
    }


def _words(value: float, unit: str) -> str:
    if unit == "bytes":
        return as_size(round(value))
    if unit == "seconds since 1970":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(value))
    if unit == "0 or 1":
        return "yes" if value else "no"
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:,.2f}"
