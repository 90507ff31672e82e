"""`splitfl bench utility` over its seeds: median and range of every setting, and the table at the terminal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitfl.bench.utility_cases import (
    DELTA,
    DESIGNS,
    EPSILON,
    FORMAL,
    INSTEAD,
    ONCE,
    RATIO,
    REFERENCE,
    TASKS,
    WHOLE_RUN,
    Task,
    reference_name,
)
from splitfl.bench.utility_figures import gain_kept, parse_name
from splitfl.report import NO_VALUE, as_duration, as_number, as_size

FORMAL_CLAIM = (
    f"epsilon {EPSILON:g} at delta {DELTA:g}; unit: one record; neighbours: one record replaced by another of the same "
    "length; adversary: whoever receives what is sent, who knows the base weights; releases of a record: one"
)
_LAST = (*INSTEAD, FORMAL)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting: a design at a level on a task."""

    task: str
    design: str
    level: str
    seeds: int
    score: Spread
    """Of the task's own metric, after training."""
    loss: Spread
    before: float
    """Median of the score before training."""
    kept: Spread | None
    """Share of the reference's gain, seed by seed; None for the reference, and where it gained nothing."""
    ratio: float | None
    """r / sigma."""
    once: float | None
    """Expected token recovery by the formula, from one release."""
    whole_run: float | None
    bytes_sent: float
    bytes_received: float
    seconds: float

    @property
    def formal(self) -> bool:
        """Whether a bound is proven for this setting."""
        return self.level == FORMAL


def summarise(cells: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Settings in the order of tasks, designs and levels; `cells` has the figures of each run by its name."""
    groups: dict[tuple[str, str, str], dict[int, Mapping[str, float]]] = defaultdict(dict)
    for name, figures in cells.items():
        task, design, level, seed = parse_name(name)
        groups[task, design, level][seed] = figures
    order = sorted(groups, key=lambda key: (list(TASKS).index(key[0]), _design_place(key[1]), level_place(key[2])))
    return [_row(key, groups[key], cells) for key in order]


def _design_place(design: str) -> int:
    return (REFERENCE, *DESIGNS).index(design)


def level_place(level: str) -> tuple[int, float]:
    """No noise first, then more and more of it, then what is no noise of a given size."""
    if level in _LAST:
        return 2 + _LAST.index(level), 0.0
    return (0, 0.0) if level == "none" else (1, -float(level))


def _row(
    key: tuple[str, str, str], runs: Mapping[int, Mapping[str, float]], cells: Mapping[str, Mapping[str, float]]
) -> Row:
    task, (name, design, level) = TASKS[key[0]], key
    first = next(iter(runs.values()))
    kept: list[float] = []
    if design != REFERENCE:
        shares = [gain_kept(task, figures, cells.get(reference_name(name, seed))) for seed, figures in runs.items()]
        kept = [share for share in shares if share is not None]

    def middle(metric: str) -> float:
        return statistics.median(figures[metric] for figures in runs.values())

    return Row(
        task=name,
        design=design,
        level=level,
        seeds=len(runs),
        score=_spread([figures[task.metric] for figures in runs.values()]),
        loss=_spread([figures["held-out loss"] for figures in runs.values()]),
        before=middle(f"{task.metric} before"),
        kept=_spread(kept) if kept else None,
        ratio=first.get(RATIO),
        once=first.get(ONCE),
        whole_run=first.get(WHOLE_RUN),
        bytes_sent=middle("bytes sent"),
        bytes_received=middle("bytes received"),
        seconds=middle("seconds"),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


# ---- words

COLUMNS = ("design", "noise", "r/sigma", "score", "range", "gain kept", "range", "recovery, once", "the run", "sent",
           "received", "time")  # fmt: skip


def score_name(task: Task) -> str:
    """The task's metric in words."""
    return {"held-out accuracy": "accuracy", "held-out macro_f1": "macro F1", "held-out loss": "loss, nats"}[
        task.metric
    ]


def level_words(row: Row) -> str:
    """What is done to activations, in a word or two."""
    if row.design == REFERENCE:
        return NO_VALUE
    if row.formal:
        return f"formal, epsilon {EPSILON:g}"
    if row.level in INSTEAD:
        return {"int4": "none, int4", "decorrelate-0": "int8 alone"}[row.level]
    return ("none, int8" if row.design == "guarded-online" else "none") if row.level == "none" else "Gaussian"


def as_share(value: float | None) -> str:
    """A share in per cent, with the digits that small ones need."""
    if value is None:
        return NO_VALUE
    percent = 100 * value
    if 0 < percent < 0.005:
        return "< 0.01 %"
    return f"{percent:.2f} %" if percent < 1 else f"{percent:.1f} %" if percent < 99.95 else "100 %"


def cells_of(row: Row) -> tuple[str, ...]:
    """The cells of a setting, in the order of `COLUMNS`."""
    kept = ("reference", NO_VALUE) if row.design == REFERENCE else (NO_VALUE, NO_VALUE)
    if row.kept is not None:
        kept = f"{row.kept.median:.2f}", f"{row.kept.low:.2f} to {row.kept.high:.2f}"
    return (
        row.design,
        level_words(row),
        NO_VALUE if row.ratio is None else as_number(row.ratio) if row.formal else f"{row.ratio:g}",
        f"{row.score.median:.3f}",
        f"{row.score.low:.3f} to {row.score.high:.3f}",
        *kept,
        as_share(row.once),
        as_share(row.whole_run),
        as_size(row.bytes_sent),
        as_size(row.bytes_received),
        as_duration(row.seconds),
    )


def print_table(cells: Mapping[str, Mapping[str, float]]) -> None:
    """Print medians and ranges on standard output, task by task, and what they do not say."""
    if not cells:
        return
    rows = summarise(cells)
    console = Console()
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        seeds = f"{mine[0].seeds} seed" + ("s" if mine[0].seeds > 1 else "")
        console.print(Text(f"{task}: {score_name(TASKS[task])}; {mine[0].before:.3f} before training; {seeds}", "bold"))
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for number, column in enumerate(_AT_TERMINAL):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        for row in mine:
            table.add_row(*_short_cells(row))
        console.print(table)
    for remark in remarks(rows):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)


_AT_TERMINAL = ("design", "noise", "score", "range", "kept", "range", "recovery")


def _short_cells(row: Row) -> tuple[str, ...]:
    design, words, ratio, score, scores, kept, shares, _, whole_run, *_ = cells_of(row)
    noise = f"r/sigma {ratio}" if words == "Gaussian" else words.replace(f", epsilon {EPSILON:g}", "")
    return design, noise, score, scores.replace(" to ", ".."), kept, shares.replace(" to ", ".."), whole_run


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know."""
    said = [
        "Kept: share of what full LoRA gains over the untuned model. Recovery: tokens that a formula expects the "
        "nearest embedding to name, over all releases of the run; no bound."
    ]
    if any(row.formal for row in rows):
        return [*said, f"Only the rows called formal are a guarantee: {FORMAL_CLAIM}."]
    return [*said, "None of these rows is a guarantee."]
