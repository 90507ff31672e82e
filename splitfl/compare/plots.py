"""Designs as numbered points: inside a page in its own colours, and as one picture for the docs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.charts import COLOURS, GRID, INK, Chart, _own_colours, _without_clutter
from splitfl.compare.result import MONEY
from splitfl.compare.summary import KEPT_ENOUGH, Row
from splitfl.errors import UsageError

_SERIES = tuple(f"#0{n}0{n}fe" for n in range(1, COLOURS + 1))  # what `splitfl.charts` turns into the page's colours
_PLAIN = ("#1f83e0", "#d9650c", "#2b9a4b", "#8a3ffc", "#c2185b", "#00838f")
_PLAIN_INK, _PLAIN_GRID = "#768390", "#8c959f"
_AWAY = ((7, 5), (7, -11), (-13, 5), (-13, -11), (-3, 9), (-3, -15), (9, -3), (-15, -3))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One design."""

    number: int
    x: float
    y: float
    colour: int
    """From 0; protocols share colours in turn."""
    pareto: bool


def privacy_points(rows: Sequence[Row], numbers: Sequence[int]) -> list[Point]:
    """Advantage of the best attack, and share of the gain kept."""
    pairs = zip(rows, numbers, strict=True)
    return [_point(r, n, r.advantage) for r, n in pairs if r.advantage is not None and r.kept is not None]


def cost_points(rows: Sequence[Row], numbers: Sequence[int]) -> list[Point]:
    """Money, and share of the gain kept."""
    return [_point(r, n, r.figures[MONEY]) for r, n in zip(rows, numbers, strict=True) if r.kept is not None]


def _point(row: Row, number: int, x: float) -> Point:
    assert row.kept is not None  # noqa: S101  whoever calls has looked
    return Point(number=number, x=x, y=row.kept.mean, colour=colour_of(row.protocol), pareto=row.pareto)


_PROTOCOLS: tuple[str, ...] = (
    "split", "guarded-online", "guarded-gradfree", "guarded-offline", "fed-params", "dp-lora", "fed-split", "fed-kd",
)  # fmt: skip


def colour_of(protocol: str) -> int:
    """Number of a protocol's colour, from 0."""
    return (_PROTOCOLS.index(protocol) if protocol in _PROTOCOLS else len(_PROTOCOLS)) % COLOURS


def scatter(title: str, remark: str, across: str, points: Sequence[Point], *, log: bool, prefix: str) -> Chart | None:
    """A drawing for the page; None where there is no point.

    Raises:
        UsageError: matplotlib is missing.
    """
    if not points:
        return None
    figure_of, context = _library()
    with context(_style(INK, GRID)):
        figure = figure_of(figsize=(5.4, 3.4), layout="constrained")
        _draw(figure.add_subplot(), points, across, _SERIES, INK, log=log)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = _own_colours(_without_clutter(file.getvalue(), prefix))
    return Chart(title=title, remark=remark, svg=svg, labels=())


def picture(panels: Sequence[tuple[str, Sequence[Point], Sequence[Point]]], out: Path, background: str) -> None:
    """Both drawings of every data set side by side, in colours that can be read on white and on black.

    Raises:
        UsageError: matplotlib is missing.
    """
    figure_of, context = _library()
    with context(_style(_PLAIN_INK, _PLAIN_GRID)):
        figure = figure_of(figsize=(9.2, 3.1 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for line, (name, privacy, cost) in zip(axes, panels, strict=True):
            _draw(line[0], privacy, "advantage of the best attack over guessing", _PLAIN, _PLAIN_INK, log=False)
            _draw(line[1], cost, "money, at the stated prices", _PLAIN, _PLAIN_INK, log=True)
            line[0].set_title(f"{name}: utility against privacy", fontsize="medium")
            line[1].set_title(f"{name}: utility against cost", fontsize="medium")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, facecolor=background, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


def _library() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("The page of a comparison needs matplotlib.", hint="pip install 'splitfl[report]'") from error
    return Figure, matplotlib.rc_context


def _style(ink: str, grid: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none", "svg.hashsalt": "splitfl", "font.family": "sans-serif", "font.size": 10,
        "text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.edgecolor": grid, "grid.color": grid,
    }  # fmt: skip


def _draw(axes: Any, points: Sequence[Point], across: str, colours: Sequence[str], ink: str, *, log: bool) -> None:
    lowest = min((point.y for point in points), default=0.0)
    floor = min(-0.05, max(lowest, -1.0) - 0.08)  # harm without end would press all others together
    if log:
        axes.set_xscale("log")
    else:
        axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(floor, max(1.15, max((point.y for point in points), default=1.0) + 0.1))
    axes.axhline(1.0, color=ink, linewidth=0.8, linestyle="--", alpha=0.6)
    axes.axhline(KEPT_ENOUGH, color=ink, linewidth=0.8, linestyle=":", alpha=0.6)
    for point in points:
        colour, y = colours[point.colour], max(point.y, floor + 0.03)
        fill = colour if point.pareto else "none"
        axes.plot([point.x], [y], "o", markersize=9 if point.pareto else 7, markerfacecolor=fill,
                  markeredgecolor=colour, markeredgewidth=1.8)  # fmt: skip
    _number(axes, points, floor)
    axes.set_xlabel(across)
    axes.set_ylabel("share of full LoRA's gain kept")
    axes.set_facecolor("none")
    axes.grid(visible=True, linewidth=0.6, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _number(axes: Any, points: Sequence[Point], floor: float) -> None:
    """Numbers beside the points, each on the side where it is farthest from other points and numbers."""
    axes.figure.canvas.draw()  # where points are is known only once the axes have their size
    places = [tuple(axes.transData.transform((point.x, max(point.y, floor + 0.03)))) for point in points]
    taken = list(places)
    scale = axes.figure.dpi / 72
    for point, (across, up) in zip(points, places, strict=True):

        def room(away: tuple[int, int], across: float = across, up: float = up) -> float:
            middle = across + (away[0] + 3) * scale, up + (away[1] + 3) * scale
            return min(math.dist(middle, other) for other in taken)

        away = max(_AWAY, key=room)
        taken.append((across + (away[0] + 3) * scale, up + (away[1] + 3) * scale))
        axes.annotate(str(point.number), (point.x, max(point.y, floor + 0.03)), xytext=away, fontsize=9,
                      textcoords="offset points", fontweight="bold" if point.pareto else "normal")  # fmt: skip
