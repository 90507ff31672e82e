"""`splitfl bench rules` over its seeds: median and range of every rule, and the table at the terminal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitfl.aggregation.rules import RULES
from splitfl.bench.rules_cases import (
    AFTER,
    ALL,
    AT_AGGREGATOR,
    BEFORE,
    DOWN,
    ERROR,
    KEPT,
    OWN,
    PASSES,
    REFERENCES,
    SAME,
    SECONDS,
    TASKS,
    UP,
    VALIDATION,
    WORST,
    Cell,
    Setting,
    of_round,
    parse_name,
)
from splitfl.bench.rules_figures import FAILED
from splitfl.report import NO_VALUE, as_number

_COLLAPSED = 0.5
"""A run that kept less of the gain of its best round, by validation, has collapsed."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rule or reference on a task; figures are those of the rate that validation chose."""

    task: str
    rule: str
    ranks: str
    rate: float
    edge: str
    """Whether the rate is the ``lowest`` or ``highest`` of several that were tried, else empty."""
    seeds: int
    failed: int
    """Seeds whose run ended in an error."""
    collapsed: int
    """Seeds that lost more than half of what they had gained, by validation; the failed ones with them."""
    idle: int
    """Seeds that were never better than the untuned model, by validation."""
    before: float
    every: Spread
    """Score on the rows of all."""
    own: Spread
    worst: Spread
    after: Spread
    """Of each party after its own steps of the last round, before they were combined."""
    validation: tuple[float, ...]
    """Median loss before the first round and after each."""
    errors: tuple[float, ...] = ()
    """Median aggregation error of each round; empty where there is none."""
    up: float | None = None
    down: float | None = None
    aggregator: float | None = None
    passes: float | None = None
    seconds: float = 0.0

    @property
    def reference(self) -> bool:
        """Whether nothing is combined."""
        return self.rule in REFERENCES


def summarise(cells: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """A row for each setting of which a run came through, in the order of tasks, ranks, references and rules."""
    groups: dict[Setting, dict[Cell, Mapping[str, float]]] = defaultdict(dict)
    for name, figures in cells.items():
        cell = parse_name(name)
        groups[cell.setting][cell] = figures
    order = [*REFERENCES, *RULES]
    settings = sorted(groups, key=lambda s: (list(TASKS).index(s.task), s.ranks != SAME, order.index(s.rule)))
    rows = (_row(setting, groups[setting]) for setting in settings)
    return [row for row in rows if row is not None]


def _row(setting: Setting, runs: Mapping[Cell, Mapping[str, float]]) -> Row | None:
    first = next(iter(runs)).seed  # the seed that rates were chosen on
    tried = {
        cell.rate: figures[VALIDATION] for cell, figures in runs.items() if cell.seed == first and VALIDATION in figures
    }
    if not tried:
        return None
    rate = min(tried, key=lambda one: (tried[one], one))
    rates = sorted({cell.rate for cell in runs if cell.seed == first})
    chosen = [figures for cell, figures in runs.items() if cell.rate == rate]
    good = [figures for figures in chosen if FAILED not in figures]

    def optional(metric: str) -> float | None:
        return statistics.median(f[metric] for f in good) if metric in good[0] else None

    def by_round(metric: str, start: int) -> tuple[float, ...]:
        found, number = [], start
        while (name := of_round(metric, number)) in good[0]:
            found.append(statistics.median(figures[name] for figures in good))
            number += 1
        return tuple(found)

    spread = {field: _spread([f[metric] for f in good])
              for field, metric in (("every", ALL), ("own", OWN), ("worst", WORST), ("after", AFTER))}  # fmt: skip
    edge = "" if len(rates) == 1 else "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else ""
    return Row(
        task=setting.task,
        rule=setting.rule,
        ranks=setting.ranks,
        rate=rate,
        edge=edge,
        seeds=len(chosen),
        failed=len(chosen) - len(good),
        collapsed=len(chosen) - len(good) + sum(figures[KEPT] < _COLLAPSED and not _idle(figures) for figures in good),
        idle=sum(map(_idle, good)),
        before=statistics.median(figures[BEFORE] for figures in good),
        validation=by_round(VALIDATION, 0),
        errors=by_round(ERROR, 1),
        up=optional(UP),
        down=optional(DOWN),
        aggregator=optional(AT_AGGREGATOR),
        passes=optional(PASSES),
        seconds=statistics.median(figures[SECONDS] for figures in good),
        **spread,
    )


def _idle(figures: Mapping[str, float]) -> bool:
    later = [value for metric, value in figures.items() if metric.startswith(f"{VALIDATION}, round ")]
    return min(later) >= figures[of_round(VALIDATION, 0)]


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


# ---- words

COLUMNS = ("rule", "rate", "all rows", "range", "own rows", "worst party", "after own steps", "error, first round",
           "last round", "up", "down", "aggregator", "collapsed")  # fmt: skip


def score_name(task: str) -> str:
    """The task's score in words."""
    return "accuracy" if TASKS[task].higher_is_better else "loss, nats a token"


def cells_of(row: Row) -> tuple[str, ...]:
    """The cells of a row, in the order of `COLUMNS`. Values are floats for each party and round."""
    errors = (error_words(row.errors[0]), error_words(row.errors[-1])) if row.errors else (NO_VALUE, NO_VALUE)
    return (
        row.rule,
        f"{row.rate:g}" + {"lowest": " (lowest)", "highest": " (highest)", "": ""}[row.edge],
        f"{row.every.median:.3f}",
        f"{row.every.low:.3f} to {row.every.high:.3f}",
        f"{row.own.median:.3f}",
        f"{row.worst.median:.3f}",
        f"{row.after.median:.3f}",
        *errors,
        NO_VALUE if row.up is None else f"{row.up:,.0f}",
        NO_VALUE if row.down is None else f"{row.down:,.0f}",
        NO_VALUE if row.aggregator is None else f"{1000 * row.aggregator:.0f} ms",
        collapse_words(row),
    )


def collapse_words(row: Row) -> str:
    """How often the run broke down, or never learnt."""
    said = [f"{row.collapsed} of {row.seeds}"] if row.collapsed else []
    said += [f"no gain in {row.idle} of {row.seeds}"] if row.idle else []
    return ", ".join(said) or "no"


def error_words(error: float) -> str:
    """An aggregation error; rounding is not told apart."""
    return "< 1e-5" if error < 1e-5 else as_number(error)


def print_tables(cells: Mapping[str, Mapping[str, float]]) -> None:
    """Print medians and ranges on standard output, task by task, and what they do not say."""
    rows = summarise(cells)
    if not rows:
        return
    console = Console()
    for task, ranks in dict.fromkeys((row.task, row.ranks) for row in rows):
        mine = [row for row in rows if (row.task, row.ranks) == (task, ranks)]
        title = f"{task}, {ranks}: {score_name(task)}; {mine[0].before:.3f} before training; seeds: {mine[0].seeds}"
        console.print(Text(title, "bold"))
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for number, column in enumerate(_AT_TERMINAL):
            table.add_column(_SHORT.get(column, column), justify="right" if number else "left", no_wrap=True)
        for row in mine:
            table.add_row(*(cells_of(row)[COLUMNS.index(column)] for column in _AT_TERMINAL))
        console.print(table)
    console.print(_REMARK, highlight=False, markup=False, soft_wrap=True)


_AT_TERMINAL = ("rule", "rate", "all rows", "own rows", "last round", "up", "collapsed")
_SHORT = {"last round": "error", "up": "floats up"}
_REMARK = (
    "Scores are of held-out rows after the last round; error: of the last combination, against the weighted mean of "
    "what the parties learnt; up: floats of a party in a round. Rates were chosen by validation on the first seed."
)
