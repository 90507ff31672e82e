"""What `splitfl bench offsite` prints in the end: a table for each model and task, what it says, and the costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitfl.bench.offsite_cases import TASKS, Task
from splitfl.bench.offsite_figures import Outcomes
from splitfl.bench.offsite_summary import (
    FLOPS,
    GAIN,
    GAP,
    MARGIN,
    MEMORY,
    ON_EMULATOR,
    ON_WHOLE,
    SHARE,
    SHARE_REACH,
    SPEED,
    SPEED_REACH,
    Row,
    Spread,
    by_task,
    comparisons,
    cost_case,
    summarise,
)
from splitfl.report import NO_VALUE, as_duration, as_number, as_size

COLUMNS = ("way", "score", "range", "loss, nats", "received", "sent", "time")
COST_COLUMNS = ("training", "speed", "memory", "FLOPs a token")


def score_name(task: Task) -> str:
    """The task's metric in words, and which way is better."""
    name = {"held-out accuracy": "accuracy", "held-out loss": "loss in nats"}[task.metric]
    return f"{name}, {'higher' if task.higher_is_better else 'lower'} is better"


def cells_of(row: Row) -> tuple[str, ...]:
    """The cells of a way, in the order of `COLUMNS`."""
    return (
        row.way,
        f"{row.score.mean:.3f}",
        f"{row.score.low:.3f} to {row.score.high:.3f}",
        f"{row.loss.mean:.3f}",
        as_size(row.received),
        as_size(row.sent),
        as_duration(row.seconds),
    )


def cost_cells(told: Mapping[str, Mapping[str, Any]], model: str) -> list[tuple[str, ...]]:
    """The lines of the costs of a model, in the order of `COST_COLUMNS`; none before they were measured."""
    lines: list[tuple[str, ...]] = []
    for what in (ON_EMULATOR, ON_WHOLE):
        facts = told.get(cost_case(model, what))
        if facts is None:
            return []
        speed = f"{as_number(facts[SPEED])} tokens/s"
        lines.append((what, speed, as_size(facts[MEMORY]), f"{facts[FLOPS] / 1e6:.1f} M"))
    return lines


def comparison_lines(task: str, found: Mapping[str, Spread]) -> list[str]:
    """What the ways of a task say of each other, a sentence each, with what is aimed at."""
    unit = "" if TASKS[task].higher_is_better else " nats"

    def told(name: str, meaning: str, aim: str = "") -> str:
        one = found[name]
        return f"{name}: {one.mean:+.3f}{unit} ({one.low:+.3f} to {one.high:+.3f}); {meaning}{aim}"

    lines = []
    if MARGIN in found:
        lines.append(told(MARGIN, "plug-in over emulator tuned", ", aim: above 0"))
        lines.append(told(GAIN, "plug-in over full zero-shot", ", aim: above 0"))
        lines.append(told(GAP, "full fine-tuning over plug-in"))
    if SHARE in found:
        one = found[SHARE]
        lines.append(f"{SHARE}: {one.mean:.1%} ({one.low:.1%} to {one.high:.1%}); aim: at least {SHARE_REACH:.0%}")
    return lines


def cost_line(told: Mapping[str, Mapping[str, Any]], model: str) -> str | None:
    """How much faster and smaller training on the emulator is; None before it was measured."""
    mine, whole = (told.get(cost_case(model, what)) for what in (ON_EMULATOR, ON_WHOLE))
    if mine is None or whole is None:
        return None
    speed, memory = mine[SPEED] / whole[SPEED], mine[MEMORY] / whole[MEMORY]
    return (
        f"training on the emulator: {speed:.2f} times the tokens a second of full LoRA (aim: {SPEED_REACH:g}), "
        f"{memory:.2f} times its memory (aim: below 1)"
    )


def print_tables(outcomes: Outcomes) -> None:
    """Print everything that there is on standard output."""
    console, rows = Console(), summarise(outcomes.ways)
    for (model, task), seeds in by_task(outcomes.ways).items():
        count = f"{len(seeds)} seed" + ("s" if len(seeds) > 1 else "")
        console.print(Text(f"{model}, {task}: {score_name(TASKS[task])}; mean and range of {count}", "bold"))
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            if (row.model, row.task) == (model, task):
                table.add_row(*cells_of(row))
        console.print(table)
        for line in comparison_lines(task, comparisons(task, seeds)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for model in dict.fromkeys(case.partition(" / training ")[0] for case in outcomes.told if " / training " in case):
        for cells in cost_cells(outcomes.told, model):
            console.print(f"{model}, training {', '.join(cells)}", highlight=False, markup=False, soft_wrap=True)
        console.print(cost_line(outcomes.told, model) or NO_VALUE, highlight=False, markup=False, soft_wrap=True)
