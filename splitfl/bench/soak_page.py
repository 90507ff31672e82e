"""The picture and the table of a soak, from the file that `splitfl bench soak --json` wrote.

``python -m splitfl.bench.soak_page FILE --picture docs/images/soak.svg`` draws the memory of every process that stays,
minute by minute, and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfl.errors import DataError, SplitflError, UsageError
from splitfl.report import as_size

_INK, _GRID = "#6b7280", "#9ca3af"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")
_MEMORY = "memory of the "
_MB = 1 << 20

Record = Mapping[str, Any]


def read(path: Path) -> list[Record]:
    """The results in a soak's file.

    Raises:
        DataError: it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"]["name"] != "soak":
            raise DataError(f"{path} holds other figures.", expected="a file that `splitfl bench soak --json` wrote")
        return list(record["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of figures ({type(error).__name__}).") from error


def curves(results: Sequence[Record]) -> dict[str, list[tuple[int, float]]]:
    """Minute and megabytes, by process."""
    found: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        if result["case"].startswith("minute ") and result["metric"].startswith(_MEMORY):
            minute = int(result["case"].removeprefix("minute "))
            found.setdefault(result["metric"].removeprefix(_MEMORY), []).append((minute, result["value"] / _MB))
    return found


def table(results: Sequence[Record]) -> str:
    """Everything but the curves, as Markdown."""
    lines = ["| what | figure | value | beside | reach |", "| --- | --- | ---: | ---: | ---: |"]
    for result in results:
        if not result["case"].startswith("minute "):
            reach, ratio = result["reach"], result["ratio"]
            value = as_size(round(result["value"])) if result["unit"] == "bytes" else f"{result['value']:,}"
            beside = "" if ratio is None else f"x {ratio:.3f}"
            cells = (result["case"], result["metric"], f"{value} {_unit(result)}".strip(), beside, _shown(reach))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _unit(result: Record) -> str:
    return "" if result["unit"] == "bytes" else str(result["unit"])


def _shown(reach: float | None) -> str:
    return "" if reach is None else f"{reach:g}" if reach < 1 else f"at most x {reach:g}"


def draw(results: Sequence[Record], out: Path) -> None:
    """Draw the curves.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("The picture needs matplotlib.", hint="pip install 'splitfl[report]'") from error
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "splitfl", "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), colour in zip(curves(results).items(), _COLOURS, strict=False):
            minutes, held = zip(*points, strict=True)
            axes.plot(minutes, held, color=colour, label=name, linewidth=1.6)
        axes.set_xlabel("minutes since faults began")
        axes.set_ylabel("resident memory, MB")
        axes.set_ylim(bottom=0)
        axes.set_facecolor("none")
        axes.grid(visible=True, axis="y", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, facecolor="none", metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


def main(words: Sequence[str] | None = None) -> int:
    """Read, draw and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.soak_page", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args(words)
    try:
        results = read(given.file)
        if given.picture is not None:
            draw(results, given.picture)
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
