"""Curves as drawings inside a page, in the page's own colours, light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from splitfl.errors import UsageError

INK, GRID = "#010203", "#040506"
COLOURS = 6
_LINES = tuple(f"#0{n}0{n}fe" for n in range(1, COLOURS + 1))
_STYLES = ("-", "--", ":")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    """Step and value; values that are not finite are left out."""
    dots: bool
    """Mark every point, for curves of few."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing and what stands around it."""

    title: str
    remark: str
    svg: str
    """Markup of ours alone: no label is in it."""
    labels: tuple[tuple[str, int, bool], ...]
    """Name, number of the colour from 1, whether the line is broken."""


def chart(title: str, remark: str, lines: Sequence[Line]) -> Chart | None:
    """Draw curves over training steps; None where there is nothing to draw.

    Raises:
        UsageError: matplotlib is missing.
    """
    finite = [[(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)] for line in lines]
    drawn = [(line, points) for line, points in zip(lines, finite, strict=True) if points]
    if not drawn:
        return None
    svg = _own_colours(_without_clutter(_svg(drawn), re.sub(r"\W", "", title).lower()))
    labels = tuple((line.label, n % COLOURS + 1, n >= COLOURS) for n, (line, _) in enumerate(drawn))
    return Chart(title=title, remark=remark, svg=svg, labels=labels)


def _svg(drawn: Sequence[tuple[Line, list[tuple[float, float]]]]) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UsageError("The report page needs matplotlib.", hint="pip install 'splitfl[report]'") from error
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "splitfl",
        "font.size": 10,
        "axes.labelsize": "medium",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": GRID,
        "grid.color": GRID,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for n, (line, points) in enumerate(drawn):
            marker = "o" if line.dots or len(points) == 1 else ""
            dashes = _STYLES[n // COLOURS % len(_STYLES)]
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, dashes, color=_LINES[n % COLOURS], marker=marker, markersize=5, linewidth=1.8)
        axes.set_xlabel("step")
        axes.grid(visible=True, axis="y", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _without_clutter(svg: str, prefix: str) -> str:
    """The bare drawing: no prologue, no metadata, no fixed size, names of parts that are unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    return re.sub(r"font-family:[^;\"]*", "font-family: inherit", svg)


def _own_colours(svg: str) -> str:
    svg = svg.replace(INK, "var(--muted)").replace(GRID, "var(--line)")
    for n, colour in enumerate(_LINES, start=1):
        svg = svg.replace(colour, f"var(--series-{n})")
    return svg
