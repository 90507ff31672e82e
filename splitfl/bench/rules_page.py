"""``python -m splitfl.bench.rules_page FILE``: docs/rules.json and the picture, from `splitfl bench rules`.

docs/rules.json is the file without its single runs: medians and ranges over the seeds. `splitfl.aggregation.page` makes
the section of docs/aggregation.md from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from splitfl.aggregation.rules import RULES
from splitfl.bench.rules_cases import MIXED, SAME
from splitfl.bench.rules_figures import by_case, read_record
from splitfl.bench.rules_section import PICTURE, row_from
from splitfl.bench.rules_table import Row, score_name, summarise
from splitfl.errors import SplitflError, UsageError
from splitfl.files import replace_text

SUMMARY = "rules.json"
_MACHINE = ("processor", "cpu_count", "torch", "transformers")
_SETTINGS = ("parties", "rounds", "local_steps", "quick")

# Of middling lightness, so that they can be read on white and on black; the background is left open.
_INK, _GRID = "#768390", "#8c959f"
_ALIKE, _MIXED, _REFERENCE = "#1f83e0", "#d9650c", "#8c959f"
_LINES = ("#1f83e0", "#d9650c", "#2b9a4b", "#a15bd6", "#c9356f", "#00929c", "#8a7a12", "#6e6ef0")


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """What docs/rules.json holds: a summary of a ``--json`` record, with nothing of single runs."""
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
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value]
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
    """Six significant digits: more are noise, and make every change of the file a long one."""
    return float(f"{value:.6g}")


# ---- the picture


def draw(rows: Sequence[Row], out: Path, *, background: str = "none") -> None:
    """For each task the scores of all rules, and the aggregation error of those that have one, by round.

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
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UsageError("The picture needs matplotlib.", hint="pip install 'splitfl[report]'") from error
    tasks = list(dict.fromkeys(row.task for row in rows))
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "splitfl", "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10.0, 4.4 * len(tasks)), layout="constrained")
        panels = figure.subplots(len(tasks), 2, squeeze=False)
        for (left, right), task in zip(panels, tasks, strict=True):
            mine = [row for row in rows if row.task == task]
            _scores(left, task, mine)
            _errors(right, task, mine)
            right.xaxis.set_major_locator(MaxNLocator(integer=True))
            for axes in (left, right):
                axes.set_facecolor("none")
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(length=0)
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, facecolor=background, metadata=metadata, dpi=110)


def _scores(axes: Any, task: str, rows: Sequence[Row]) -> None:
    """A line a rule: the median on the rows of all, with the range over seeds as a bar."""
    names = list(dict.fromkeys(row.rule for row in rows))
    for row in rows:
        mixed = row.ranks == MIXED
        colour = _REFERENCE if row.reference else _MIXED if mixed else _ALIKE
        label = None if row.reference else "ranks differ" if mixed else "one rank"
        below, above = row.every.median - row.every.low, row.every.high - row.every.median
        axes.errorbar([row.every.median], [names.index(row.rule) + (0.28 if mixed else 0)], xerr=([below], [above]),
                      color=colour, fmt="s" if mixed else "o", markersize=5, elinewidth=1.4, label=label)  # fmt: skip
    axes.axvline(rows[0].before, color=_GRID, linewidth=1.2, linestyle=":", label="before training")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", linewidth=0.6, alpha=0.4)
    axes.set_title(f"{task}: held-out {score_name(task)}, rows of all", fontsize="medium")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize="small", loc="best")


def _errors(axes: Any, task: str, rows: Sequence[Row]) -> None:
    """Aggregation error by round, of the rules that are not exact; rounding is not drawn."""
    shown = [row for row in rows if row.ranks == SAME and row.errors and not RULES[row.rule].exact]
    for number, row in enumerate(shown):
        rounds = [n for n, error in enumerate(row.errors, start=1) if error >= 1e-5]
        drawn, line = [row.errors[n - 1] for n in rounds], "-" if number < len(_LINES) else "--"
        axes.plot(rounds, drawn, color=_LINES[number % len(_LINES)], marker="o", linestyle=line,
                  markersize=4, linewidth=1.4, label=row.rule)  # fmt: skip
    axes.set_title(f"{task}: aggregation error", fontsize="medium")
    axes.set_xlabel("round")
    axes.set_yscale("log")
    axes.grid(visible=True, axis="y", linewidth=0.6, alpha=0.4)
    if shown:
        axes.legend(frameon=False, fontsize="small", loc="best")


def write_page(file: Path, docs: Path) -> tuple[Path, Path]:
    """Write the summary and the picture into `docs`; the paths of both.

    Raises:
        DataError: `file` holds no figures of this benchmark.
        UsageError: it holds no run, or one of ``--quick``; matplotlib is missing.
    """
    summary = compact(read_record(file))
    rows = [row_from(entry) for entry in summary["rows"]]
    if all(row.reference for row in rows):
        raise UsageError(f"{file} holds no run to show.", hint="let `splitfl bench rules --resume` go on")
    if summary["settings"]["quick"]:
        raise UsageError(f"{file} is of --quick, whose figures mean nothing.", hint="leave --quick out")
    draw(rows, docs / PICTURE)
    target = docs / SUMMARY
    replace_text(target, json.dumps(summary, indent=1) + "\n")
    return target, docs / PICTURE


def main(words: Sequence[str] | None = None) -> int:
    """Read the file, write summary and picture; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.rules_page", description=__doc__)
    parser.add_argument("file", type=Path, help="a file that `splitfl bench rules --json` wrote")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    given = parser.parse_args(words)
    try:
        for path in write_page(given.file, given.docs):
            print(f"wrote {path}")
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("Now write the page: python -m splitfl.aggregation.page > docs/aggregation.md (or make docs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
