"""``python -m splitfl.bench.utility_page FILE``: docs/utility.json and the picture, from `splitfl bench utility`.

docs/utility.json is the file without its single runs: medians and ranges over the seeds. `protocols.page` makes the
section of docs/protocols.md from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from splitfl.bench.utility_cases import DESIGNS, EPSILON, FORMAL, INSTEAD, REFERENCE, TASKS
from splitfl.bench.utility_figures import by_case, read_record
from splitfl.bench.utility_section import PICTURE, row_from
from splitfl.bench.utility_table import Row, level_place, score_name, summarise
from splitfl.errors import SplitflError, UsageError
from splitfl.files import replace_text

SUMMARY = "utility.json"
_MACHINE = ("processor", "cpu_count", "torch", "transformers")
_SETTINGS = ("max_steps", "quick", "workers")

# Of middling lightness, so that they can be read on white and on black; the background is left open.
_INK, _GRID, _NEUTRAL = "#768390", "#8c959f", "#8c959f"
_LOOKS = {"split": ("#1f83e0", "o"), "guarded-online": ("#d9650c", "s"), "guarded-gradfree": ("#2b9a4b", "^")}


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """What docs/utility.json holds: a summary of a ``--json`` record, with nothing of single runs."""
    told, cells = by_case(record["results"])
    return {
        "version": record["version"],
        "machine": {name: record["machine"][name] for name in _MACHINE},
        "settings": {name: record["settings"][name] for name in _SETTINGS},
        "tasks": {task: {name: _short(value) for name, value in facts.items()} for task, facts in told.items()},
        "rows": [_shortened(asdict(row)) for row in summarise(cells)],
    }


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
    """Six significant digits: more are noise, and make every change of the file a long one."""
    return float(f"{value:.6g}")


# ---- the picture


def draw(rows: Sequence[Row], out: Path, *, background: str = "none") -> None:
    """Score against r/sigma, a panel a task: the median of each design, with the range over seeds as a bar.

    Args:
        rows: every setting.
        out: the file; its ending says the format.
        background: a colour, or ``none`` to let the page's own show.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("The picture needs matplotlib.", hint="pip install 'splitfl[report]'") from error
    tasks = list(dict.fromkeys(row.task for row in rows))
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "splitfl", "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.0 * len(tasks), 3.6), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            _panel(axes, task, [row for row in rows if row.task == task])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, facecolor=background, metadata=metadata, dpi=110)


def _panel(axes: Any, task: str, rows: Sequence[Row]) -> None:
    places = _places(rows)
    for number, design in enumerate(design for design in DESIGNS if any(row.design == design for row in rows)):
        colour, marker = _LOOKS[design]
        mine = sorted((r for r in rows if r.design == design and r.level in places), key=lambda r: places[r.level])
        xs = [places[row.level] + 0.08 * (number - 1) for row in mine]  # side by side, so that bars can be told apart
        middle = [row.score.median for row in mine]
        below = [row.score.median - row.score.low for row in mine]
        above = [row.score.high - row.score.median for row in mine]
        axes.errorbar(xs, middle, yerr=(below, above), color=colour, fmt=marker, markersize=5, elinewidth=1.4,
                      label=design)  # fmt: skip
        joined = [n for n, row in enumerate(mine) if not row.formal]
        axes.plot([xs[n] for n in joined], [middle[n] for n in joined], color=colour, linewidth=1.6)
    for row in rows:
        if row.design == REFERENCE:
            axes.axhline(row.score.median, color=_NEUTRAL, linewidth=1.4, linestyle="--", label=f"{REFERENCE} (no cut)")
            axes.axhline(row.before, color=_NEUTRAL, linewidth=1.4, linestyle=":", label="before training")
    axes.set_title(f"{task}: held-out {score_name(TASKS[task])}", fontsize="medium")
    axes.set_xticks(list(places.values()), [_tick(level) for level in places])
    axes.set_xlabel("r/sigma: more noise to the left")
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", linewidth=0.6, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _places(rows: Sequence[Row]) -> dict[str, int]:
    """Where each level stands on the axis, the formal one first; `INSTEAD` is no size of noise and has no place."""
    levels = {row.level for row in rows if row.level not in INSTEAD}
    return {level: number for number, level in enumerate(sorted(levels, key=level_place, reverse=True))}


def _tick(level: str) -> str:
    return f"formal,\nepsilon {EPSILON:g}" if level == FORMAL else "no noise" if level == "none" else level


def write_page(file: Path, docs: Path) -> tuple[Path, Path]:
    """Write the summary and the picture into `docs`; the paths of both.

    Raises:
        DataError: `file` holds no figures of this benchmark.
        UsageError: it holds no run, or one of ``--quick``; matplotlib is missing.
    """
    summary = compact(read_record(file))
    rows = [row_from(entry) for entry in summary["rows"]]
    if not any(row.design != REFERENCE for row in rows):
        raise UsageError(f"{file} holds no run to show.", hint="let `splitfl bench utility --resume` go on")
    if summary["settings"]["quick"]:
        raise UsageError(f"{file} is of --quick, whose figures mean nothing.", hint="leave --quick out")
    draw(rows, docs / PICTURE)
    target = docs / SUMMARY
    replace_text(target, json.dumps(summary, indent=1) + "\n")
    return target, docs / PICTURE


def main(words: Sequence[str] | None = None) -> int:
    """Read the file, write summary and picture; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.utility_page", description=__doc__)
    parser.add_argument("file", type=Path, help="a file that `splitfl bench utility --json` wrote")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    given = parser.parse_args(words)
    try:
        for path in write_page(given.file, given.docs):
            print(f"wrote {path}")
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("Now write the page: python -m protocols.page > docs/protocols.md (or make docs)")
    print(f"To measure again:   splitfl bench utility --json {given.file}, and then this command")
    return 0


if __name__ == "__main__":
    sys.exit(main())
