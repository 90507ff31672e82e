"""``python -m splitfl.bench.offsite_page FILE``: the comparison in docs/offsite.md, from `splitfl bench offsite`.

Writes docs/offsite.json (the file without its single runs: means and ranges over the seeds), the picture, and the
section of docs/offsite.md between the two markers. With --keep, models that FILE does not hold stay as they are in
docs/offsite.json, since a grid takes hours. Without FILE, the section alone, from docs/offsite.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from splitfl.bench.offsite_cases import FULL_TUNED, FULL_ZERO, PLUGIN, RATES, TASKS, TRAININGS, TRIAL_SEED, WAYS, Cell
from splitfl.bench.offsite_figures import Outcomes, by_case, read_record
from splitfl.bench.offsite_section import BEGIN, END, PICTURE, machine_of, row_from, section
from splitfl.bench.offsite_summary import Row, by_task, comparisons, summarise
from splitfl.bench.offsite_table import score_name
from splitfl.config import BenchSettings
from splitfl.errors import DataError, SplitflError, UsageError
from splitfl.files import replace_text

SUMMARY, PAGE = "offsite.json", "offsite.md"
_MACHINE = ("processor", "cpu_count", "accelerator", "torch", "transformers")
_SETTINGS = ("max_steps", "quick", "keep", "distil_steps", "device")

# Of middling lightness, so that they can be read on white and on black; the background is left open.
_INK, _GRID, _PLAIN, _OURS = "#768390", "#8c959f", "#1f83e0", "#d9650c"


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """What docs/offsite.json holds: a summary of a ``--json`` record, with nothing of single runs."""
    told, trials, ways = by_case(record["results"])
    settings = record["settings"]
    outcomes = Outcomes(settings=BenchSettings(name="offsite"), trials=trials)
    chosen = {
        f"{model} / {task}": {
            training: outcomes.best_rate(model, TASKS[task], training)
            for training in TRAININGS
            if Cell(model=model, task=TASKS[task], training=training, seed=TRIAL_SEED, rate=RATES[0]).name in trials
        }
        for model, task in by_task(ways)
    }
    summary = {
        "version": record["version"],
        "machine": {name: record["machine"][name] for name in _MACHINE},
        "settings": {name: settings[name] for name in _SETTINGS},
        "rates": list(RATES),
        "tasks": {case: facts for case, facts in told.items() if case in TASKS},
        "emulators": {case: facts for case, facts in told.items() if " / emulator for " in case},
        "costs": {case: facts for case, facts in told.items() if " / training " in case},
        "chosen": {case: one for case, one in chosen.items() if one},
        "rows": [asdict(row) for row in summarise(ways)],
        "comparisons": {
            f"{model} / {task}": {name: asdict(one) for name, one in comparisons(task, seeds).items()}
            for (model, task), seeds in by_task(ways).items()
        },
    }
    return dict(_shortened(summary))


def merged(summary: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """`summary`, and of `kept`, which was measured before it, the models that it does not have.

    A model is compared with itself alone, so that the two may be of different machines: each is named.

    Raises:
        UsageError: the two are of other settings, tasks or versions, so that they are no one table.
    """
    for name in ("version", "settings", "rates"):
        if summary[name] != kept[name]:
            raise UsageError(
                f"The figures kept are of another {name} than those of the file.",
                hint="run both models, or leave --keep out",
            )
    tasks = {**kept["tasks"], **summary["tasks"]}
    other = [task for task, facts in kept["tasks"].items() if tasks[task] != facts]
    if other:
        raise UsageError(f"The figures kept had other rows or steps for task {other[0]!r}.", hint="leave --keep out")
    new = {row["model"] for row in summary["rows"]}
    machines = {row["model"]: machine_of(kept, row["model"]) for row in kept["rows"]}
    both = {**summary, "tasks": tasks, "machines": {**machines, **dict.fromkeys(new, summary["machine"])}}
    both["rows"] = [row for row in kept["rows"] if row["model"] not in new] + summary["rows"]
    for name in ("emulators", "costs", "chosen", "comparisons"):
        old = {case: facts for case, facts in kept[name].items() if case.split(" / ")[0] not in new}
        both[name] = {**old, **summary[name]}
    return both


def _shortened(value: Any) -> Any:
    """Floats with six significant digits: more are noise, and make every change of the file a long one."""
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---- the picture


def draw(rows: Sequence[Row], out: Path, *, background: str = "none") -> None:
    """Score of every way, a panel for each model and task: the mean, with the range over seeds as a bar.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("The picture needs matplotlib.", hint="pip install 'splitfl[report]'") from error
    models, tasks = list(dict.fromkeys(r.model for r in rows)), list(dict.fromkeys(r.task for r in rows))
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "splitfl", "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.0 * len(tasks), 2.9 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), len(tasks), squeeze=False)
        for line, model in zip(panels, models, strict=True):
            for axes, task in zip(line, tasks, strict=True):
                _panel(axes, model, task, [r for r in rows if (r.model, r.task) == (model, task)])
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, facecolor=background, metadata=metadata, dpi=110)


def _panel(axes: Any, model: str, task: str, rows: Sequence[Row]) -> None:
    for row in rows:
        place, score = WAYS.index(row.way), row.score
        bar = ((score.mean - score.low,), (score.high - score.mean,))
        colour = _OURS if row.way == PLUGIN else _PLAIN
        axes.errorbar([place], [score.mean], yerr=bar, color=colour, fmt="o", markersize=6, elinewidth=1.6)
        if row.way in (FULL_ZERO, FULL_TUNED):
            axes.axhline(score.mean, color=_GRID, linewidth=1.0, linestyle=":")
    axes.set_title(f"{model}, {task}: {score_name(TASKS[task])}", fontsize="small")
    axes.set_xticks(range(len(WAYS)), [way.replace(" ", "\n") for way in WAYS], fontsize="x-small")
    axes.set_xlim(-0.5, len(WAYS) - 0.5)
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", linewidth=0.6, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


# ---- the files


def filled(page: str, record: Mapping[str, Any]) -> str:
    """The page with the section between its markers.

    Raises:
        DataError: it has not both markers, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"The page has no place for the section: {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n" + "\n".join(section(record)) + f"\n{END}{after}"


def write_page(file: Path | None, docs: Path, *, keep: bool = False) -> list[Path]:
    """Write summary, picture and section into `docs`; the paths of what was written.

    Args:
        file: figures of `splitfl bench offsite`; None writes the section alone.
        docs: folder of the pages.
        keep: leave models that `file` does not hold as they are.

    Raises:
        DataError: `file` holds no figures of this benchmark, or the page has no place for them.
        UsageError: it holds no way, or those of ``--quick``; matplotlib is missing.
    """
    written = []
    if file is not None:
        summary = compact(read_record(file))
        if not summary["rows"]:
            raise UsageError(f"{file} holds no run to show.", hint="let `splitfl bench offsite --resume` go on")
        if summary["settings"]["quick"]:
            raise UsageError(f"{file} is of --quick, whose figures mean nothing.", hint="leave --quick out")
        if keep and (docs / SUMMARY).is_file():
            summary = merged(summary, json.loads((docs / SUMMARY).read_text(encoding="utf-8")))
        draw([row_from(entry) for entry in summary["rows"]], docs / PICTURE)
        replace_text(docs / SUMMARY, json.dumps(summary, indent=1) + "\n")
        written = [docs / PICTURE, docs / SUMMARY]
    page = docs / PAGE
    record = json.loads((docs / SUMMARY).read_text(encoding="utf-8"))
    replace_text(page, filled(page.read_text(encoding="utf-8"), record))
    return [*written, page]


def main(words: Sequence[str] | None = None) -> int:
    """Read the file, write what is made of it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m splitfl.bench.offsite_page", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="a file that `splitfl bench offsite --json` wrote")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    parser.add_argument("--keep", action="store_true", help="keep the figures of models that the file does not hold")
    given = parser.parse_args(words)
    try:
        for path in write_page(given.file, given.docs, keep=given.keep):
            print(f"wrote {path}")
    except SplitflError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
