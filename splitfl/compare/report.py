"""The files of a comparison: one CSV with a line a cell, one HTML page, and the figures of ``--json``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfl.compare.grid import Grid
from splitfl.compare.plots import cost_points, privacy_points, scatter
from splitfl.compare.result import (
    HANDED,
    MONEY,
    OWNER_FLOP,
    OWNER_S,
    PARTY_FLOP,
    PARTY_MEMORY,
    PARTY_S,
    SCORE,
    TRIPS,
    UNITS,
    Outcome,
)
from splitfl.compare.summary import Row, money, verdict
from splitfl.compare.table import attack, score
from splitfl.files import replace_text
from splitfl.metrics import Result
from splitfl.report import NO_VALUE, _render, as_size

CSV, PAGE = "compare.csv", "compare.html"
_ABOUT = ("data", "cut", "design", "protocol", "mechanism", "seed", "metric")
_ATTACK = ("name", "knowledge", "metric", "value", "low", "high", "baseline", "beyond", "beyond_low", "beyond_high")
SENDS = {
    "hidden": "activations", "gradient": "gradients", "update": "adapter updates", "logits": "answers to public rows",
    "adapter": "the adapter, once",
}  # fmt: skip
HANDS = {"kit": "the kit", "emulator": "kit and emulator", "model": "the whole model"}


def write_csv(path: Path, outcomes: Sequence[Outcome], rows: Sequence[Row], grid: Grid) -> None:
    """One line a cell: what it is, every figure, the best attack on the rows and on the trunk, and what failed."""
    names = [name for name in UNITS if name != MONEY]
    best = [f"attack {name}" for name in _ATTACK]
    extraction = [f"extraction {name}" for name in _ATTACK]
    told = ["sends", "hands", "summed", "bound", "pareto", "not attacked", "failed"]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_ABOUT, *names, MONEY, *best, *extraction, *told])
    stars = {(row.data, row.cut, row.design): row.pareto for row in rows}
    for outcome in outcomes:
        figures = [outcome.figures.get(name, "") for name in names]
        cost = "" if outcome.failed else money(outcome, grid.prices)
        star = stars.get((outcome.data, outcome.cut, outcome.design), False)
        writer.writerow(
            [*(getattr(outcome, name) for name in _ABOUT), *figures, cost, *_strongest(outcome, "holder"),
             *_strongest(outcome, "owner"), " ".join(outcome.sends), outcome.hands, outcome.summed, outcome.bound,
             int(star), outcome.not_attacked, outcome.failed]
        )  # fmt: skip
    replace_text(path, out.getvalue())


def _strongest(outcome: Outcome, side: str) -> list[object]:
    mine = [attack for attack in outcome.attacks if attack.side == side]
    if not mine:
        return [""] * len(_ATTACK)
    best = max(mine, key=lambda a: (a.works, a.advantage))
    return [getattr(best, name) for name in _ATTACK]


def json_results(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> list[Result]:
    """Every figure of every cell, then what the rows derive from them."""
    results = []
    for outcome in outcomes:
        case = f"{outcome.data} / {outcome.cut} / {outcome.design} / seed {outcome.seed}"
        results += [Result(case=case, metric=n, value=v, unit=UNITS[n]) for n, v in outcome.figures.items()]
        for one in outcome.attacks:
            name = f"{one.name} {one.knowledge}: {one.metric}"
            results.append(Result(case=case, metric=name, value=one.value, unit="", reference=one.baseline))
        if outcome.failed:
            results.append(Result(case=case, metric="failed", value=outcome.failed, unit=""))
    for row in rows:
        case = f"{row.data} / {row.cut} / {row.design}"
        derived: dict[str, Any] = {
            "share of full LoRA's gain kept": None if row.kept is None else row.kept.mean, "points lost": row.lost,
            "advantage of the best attack": row.advantage, "in the Pareto set": int(row.pareto),
        }  # fmt: skip
        results += [Result(case=case, metric=name, value=value, unit="") for name, value in derived.items()]
        results.append(Result(case=case, metric=MONEY, value=row.figures[MONEY], unit=""))
    return results


# ---- the page


def write_page(path: Path, rows: Sequence[Row], grid: Grid, outcomes: Sequence[Outcome], *, quick: bool) -> None:
    """Write the page whole.

    Raises:
        UsageError: matplotlib or jinja2 is missing.
    """
    sections = [_section(data, [r for r in rows if r.data == data], grid) for data in grid.data]
    page = _render(
        "compare.html.j2",
        verdict=verdict(rows, grid),
        closed=any(row.closed for row in rows if grid.data[row.data].classes),
        sections=[section for section in sections if section["rows"]],
        failed=[outcome for outcome in outcomes if outcome.failed],
        prices=grid.prices,
        cells=len(outcomes),
        stars=sum(row.pareto for row in rows),
        seeds=sorted({outcome.seed for outcome in outcomes}),
        quick=quick,
        parties=grid.course.parties,
    )
    replace_text(path, page)


def _section(data: str, rows: Sequence[Row], grid: Grid) -> dict[str, Any]:
    numbers = range(1, len(rows) + 1)
    shown = [(row, n) for row, n in zip(rows, numbers, strict=True) if not row.is_reference]
    mine, places = [row for row, _ in shown], [n for _, n in shown]
    currency = grid.prices.currency
    charts = [
        scatter("Utility against privacy", "up and to the left is better", "advantage of the best attack over guessing",
                privacy_points(mine, places), log=False, prefix=f"{data}-privacy"),
        scatter("Utility against cost", "up and to the left is better", f"money ({currency})",
                cost_points(mine, places), log=True, prefix=f"{data}-cost"),
    ]  # fmt: skip
    return {
        "name": data,
        "title": grid.data[data].title,
        "metric": rows[0].metric if rows else "",
        "charts": [chart for chart in charts if chart],
        "rows": [dict(table_row(row, number)) for row, number in zip(rows, numbers, strict=True)],
    }


def table_row(row: Row, number: int) -> Iterator[tuple[str, Any]]:
    """What the page's table and docs/compare.md show of a row, by name."""
    figures = row.figures
    yield "number", number
    yield "pareto", row.pareto
    yield "closed", row.closed
    yield "reference", row.is_reference
    yield "design", row.design
    yield "cut", row.cut
    yield "kept", NO_VALUE if row.kept is None else f"{100 * row.kept.mean:.0f} %"
    yield "score", score(row)
    yield "lost", NO_VALUE if row.lost is None else f"{row.lost:.1f}"
    yield "attack", attack(row)
    yield "guessing", guessing(row)
    yield "advantage", NO_VALUE if row.advantage is None else f"{row.advantage:.2f}"
    yield "attacks", row.attacks
    yield "leaves", leaves(row)
    yield "hands", HANDS.get(row.hands, NO_VALUE)
    yield "bound", row.bound or "none"
    yield "size", as_size(int(row.bytes))
    yield "wire", as_size(int(row.bytes - figures.get(HANDED, 0.0)))
    yield "party", f"{figures[PARTY_S]:.1f} s"
    yield "owner", f"{figures[OWNER_S]:.1f} s"
    yield "flop", f"{figures[PARTY_FLOP] / 1e9:,.0f} + {figures[OWNER_FLOP] / 1e9:,.0f}"
    yield "memory", as_size(int(figures[PARTY_MEMORY]))
    yield "trips", f"{figures[TRIPS]:.0f}"
    yield "money", f"{figures[MONEY]:.4f}"
    yield "side", owners_side(row)


def guessing(row: Row) -> str:
    """Beyond guessing, with its interval."""
    best = row.best
    if best is None:
        return NO_VALUE
    return f"{best.baseline:.2f}; {best.beyond:+.2f} [{best.beyond_low:+.2f}, {best.beyond_high:+.2f}]"


def leaves(row: Row) -> str:
    """What leaves the holder, in words."""
    if row.is_reference:
        return "nothing: one person holds all"
    words = ", ".join(SENDS.get(tensor, tensor) for tensor in row.sends) or "nothing"
    return f"{words}, summed as {row.summed}" if row.summed and row.sends != ("hidden", "gradient") else words


def owners_side(row: Row) -> str:
    """What the owner gives away, measured where it was."""
    parts = []
    if "share of the trunk given" in row.figures:
        parts.append(f"{100 * row.figures['share of the trunk given']:.0f} % of the trunk")
    if "emulator margin" in row.figures:
        parts.append(f"margin {row.figures['emulator margin']:+.1f} points")
    if row.figures.get("tokens answered"):
        parts.append(f"{row.figures['tokens answered']:,.0f} tokens answered")
    if row.extraction is not None:
        parts.append(f"{row.extraction.name}: {row.extraction.metric} {row.extraction.value:.2f}")
    if not parts:
        return "the whole model" if row.hands == "model" else NO_VALUE
    return "; ".join(parts)


def scores_of(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """Score of each cell, by its name; for tests and for people at a prompt."""
    return {f"{o.data}/{o.design}/{o.seed}": o.figures[SCORE] for o in outcomes if not o.failed}
