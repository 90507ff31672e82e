"""A run directory as one page that anybody can read: what was run, what it gained, what left the machine.

The page is a single file without outside resources, so it can be sent by mail and opened anywhere. Its figures describe
private data; whoever passes it on passes them on.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import splitfl
from splitfl.charts import Line, chart
from splitfl.errors import DataError, UsageError
from splitfl.files import replace_text
from splitfl.metrics import machine, read_run

NO_VALUE = "\N{EN DASH}"
FACTS = {
    "protocol": "Protocol",
    "model": "Model",
    "architecture": "Architecture",
    "task": "Task",
    "dtype": "Type of the computation",
    "wire_dtype": "Type of tensors on the wire",
    "mechanism": "Mechanism on activations",
    "claim": "What it promises",
    "hidden_coding": "Coding of activations",
    "gradient_coding": "Coding of gradients",
    "trains_bottom": "Adapters below the cut",
    "sends_gradients": "Gradients may cross",
    "memory": "Between forward and backward, the owner",
    "trainable_parameters": "Parameters trained",
    "train_rows": "Rows to train on",
    "eval_rows": "Held-out rows",
    "fingerprint": "Fingerprint of the plan",
}
"""Facts of a ``start`` record that have a name of their own on the page; others appear under their key."""
CUT = ("bottom", "layers", "top")
"""Facts that say how the model was cut: numbers of layers, `layers` of all of them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run directory say."""

    name: str
    facts: dict[str, Any]
    """Of the ``start`` records, the later one wins."""
    train: list[dict[str, Any]]
    """``train`` records in order of steps; what a resumed run did again stands only once."""
    evals: list[dict[str, Any]]
    finished: bool
    totals: dict[str, float]
    """``seconds``, ``bytes_sent``, ``bytes_received``, ``peak_rss_bytes`` over all starts."""
    disclosure: dict[str, Any] | None
    settings: dict[str, Any]

    def measured(self, when: str) -> dict[str, Any]:
        """The held-out figures ``before`` or ``after``; the last ones there are, if it did not end; else empty."""
        found = [e for e in self.evals if e.get("when") == when]
        if when == "after" and not found:
            found = [e for e in self.evals if e.get("when") == "during"]
        return found[-1] if found else {}

    @property
    def steps(self) -> int:
        """Steps trained."""
        return int(self.train[-1]["step"]) if self.train else 0

    def per_step(self, name: str) -> float | None:
        """Mean of an amount (tokens, bytes, seconds) over the training steps."""
        return sum(r.get(name) or 0 for r in self.train) / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the training steps."""
        seconds = self.per_step("seconds")
        return (self.per_step("tokens") or 0) / seconds if seconds else None


def read_run_directory(run_dir: Path) -> Run:
    """Read ``run.jsonl``, and ``disclosure.json`` and ``config.toml`` where they are there.

    Raises:
        DataError: a file cannot be read.
    """
    records = read_run(run_dir / "run.jsonl")
    facts: dict[str, Any] = {}
    for record in records:
        if record["event"] == "start":
            facts |= _flat(record)
    return Run(
        name=run_dir.resolve().name,
        facts={key: value for key, value in facts.items() if key not in ("event", "time", "step")},
        train=_once([r for r in records if r["event"] == "train"]),
        evals=_evals([r for r in records if r["event"] == "eval"]),
        finished=bool(records) and any(r["event"] == "end" for r in _segments(records)[-1]),
        totals=_totals(records),
        disclosure=_optional(run_dir / "disclosure.json", json.loads),
        settings=_optional(run_dir / "config.toml", tomllib.loads) or {},
    )


def _optional(path: Path, parse: Any) -> Any:
    if not path.exists():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {type(error).__name__}.", hint="restore it, or move it away"
        ) from error


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its nesting: a table inside it counts as if its keys stood outside."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return flat


def _once(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records in order of steps; where a resumed run trained a step again, the later record."""
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def _evals(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    when = {word: [r for r in records if r.get("when") == word] for word in ("before", "during", "after")}
    return when["before"][:1] + _once(when["during"]) + when["after"][-1:]


def _segments(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each start, so that a run that was resumed counts in full."""
    segments: list[list[dict[str, Any]]] = [[]]
    for record in records:
        if record["event"] == "start" and segments[-1]:
            segments.append([])
        segments[-1].append(record)
    return segments


def _totals(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    totals = dict.fromkeys(("seconds", "bytes_sent", "bytes_received", "peak_rss_bytes"), 0.0)
    for segment in _segments(records):
        end = next((r for r in segment if r["event"] == "end"), None)
        counted = [end] if end else [r for r in segment if r["event"] == "train"]
        for name in ("seconds", "bytes_sent", "bytes_received"):
            totals[name] += sum(r.get(name) or 0 for r in counted)
        totals["peak_rss_bytes"] = max(totals["peak_rss_bytes"], (end or {}).get("peak_rss_bytes") or 0)
    return totals


# --- the pages --------------------------------------------------------------------------------------------------------


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory.

    Returns:
        The path of the page.

    Raises:
        UsageError: matplotlib or jinja2 is missing.
        DataError: a file of the run cannot be read.
    """
    run = read_run_directory(run_dir)
    before, after = run.measured("before"), run.measured("after")
    charts = [
        chart(
            "Loss", "lower is better", [_line("training rows", run.train, "loss"), _evals_line("held-out rows", run)]
        ),
        chart("Speed", "tokens per second", [_line("training", run.train, "tokens_per_s")]),
    ]
    page = render(
        "report.html.j2",
        run=run,
        loss=gain("loss", before, after),
        gains=[gain(name, before, after) for name in ("loss", "perplexity", "accuracy") if name in after],
        facts=_named_facts(run),
        charts=[c for c in charts if c],
        crossings=_crossings(run.disclosure),
    )
    replace_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def write_demo_report(out_dir: Path, owner_info: Mapping[str, Any], runs: Mapping[str, Path]) -> Path:
    """Write ``report.html`` that compares several parties.

    Args:
        out_dir: where to write it.
        owner_info: facts about the owner's side, name to value, in the order to show them.
        runs: the run directory of each party, by the party's name.

    Returns:
        The path of the page.

    Raises:
        UsageError: matplotlib or jinja2 is missing.
        DataError: a file of a run cannot be read.
    """
    read = {party: read_run_directory(path) for party, path in runs.items()}
    charts = [
        chart("Loss on training rows", "lower is better", [_line(p, r.train, "loss") for p, r in read.items()]),
        chart("Loss on held-out rows", "lower is better", [_evals_line(p, r) for p, r in read.items()]),
        chart("Speed", "tokens per second", [_line(p, r.train, "tokens_per_s") for p, r in read.items()]),
    ]
    first = next(iter(read.values()), None)
    links = {party: os.path.relpath(path / "report.html", out_dir) for party, path in runs.items()}
    page = render(
        "demo.html.j2",
        owner=dict(owner_info),
        runs=read,
        links={party: quote(link) for party, link in links.items() if (out_dir / link).exists()},
        gains={party: gain("loss", run.measured("before"), run.measured("after")) for party, run in read.items()},
        charts=[c for c in charts if c],
        disclosure=first.disclosure if first else None,
        crossings=_crossings(first.disclosure if first else None),
    )
    replace_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def _line(label: str, records: Sequence[Mapping[str, Any]], name: str) -> Line:
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    return Line(label=label, points=points, dots=False)


def _evals_line(label: str, run: Run) -> Line:
    points = [(e.get("step", 0), e["loss"]) for e in run.evals if isinstance(e.get("loss"), int | float)]
    return Line(label=label, points=points, dots=True)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One held-out figure, before and after."""

    name: str
    before: float | None
    after: float | None
    better: bool | None
    """None where it did not move, or where a side is missing."""


def gain(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Gain:
    """A held-out figure of a run, before and after."""
    old, new = before.get(name), after.get(name)
    better = None if old is None or new is None or old == new else (new > old) == (name in ("accuracy", "macro_f1"))
    return Gain(name=name, before=old, after=new, better=better)


def _named_facts(run: Run) -> dict[str, Any]:
    """The facts of a run under the names that a reader knows; settings are shown elsewhere."""
    facts = run.facts
    named = {words: facts[key] for key, words in FACTS.items() if facts.get(key) is not None}
    bottom, layers, top = (facts.get(key) for key in CUT)
    if isinstance(bottom, int) and isinstance(layers, int) and isinstance(top, int):
        named["Cut"] = f"{bottom} layers here, {layers - bottom - top} at the owner, {top} here"
    shown = {*FACTS, *CUT, *run.settings}
    return named | {key.replace("_", " "): value for key, value in facts.items() if key not in shown}


def _crossings(disclosure: Mapping[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """The crossings of a disclosure by direction; those that carry a tensor first."""
    listed = (disclosure or {}).get("crossings", ())
    ordered = sorted(listed, key=lambda crossing: crossing["tensor"] is None)
    return {
        way: [c for c in ordered if c["direction"] in also]
        for way, also in (
            ("party to owner", ("party to owner", "peer to peer")),
            ("owner to party", ("owner to party",)),
        )
    }


def render(template: str, **values: Any) -> str:
    """A page from one of our templates; every value is escaped.

    Raises:
        UsageError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UsageError("The report page needs jinja2.", hint="pip install 'splitfl[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("splitfl"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": as_size, "number": as_number, "duration": as_duration, "value": as_value}
    return environment.get_template(template).render(**values, version=splitfl.__version__, machine=_machine_facts())


_render = render


def _machine_facts() -> dict[str, Any]:
    facts = {"splitfl": splitfl.__version__} | {k: v for k, v in machine().items() if v is not None}
    memory = {"memory": as_size(facts.pop("memory_bytes"))}
    return {key.replace("_", " "): value for key, value in (facts | memory).items()}


# --- figures in words -------------------------------------------------------------------------------------------------


def as_size(count: float | None) -> str:
    """Bytes in powers of 1000: ``1.5 MB``; a dash for None."""
    if count is None:
        return NO_VALUE
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def as_number(value: float | None) -> str:
    """Four significant digits, large numbers with commas; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".")


def as_duration(seconds: float | None) -> str:
    """``48 s``, ``3 min 5 s``, ``2 h 10 min``; a dash for None."""
    if seconds is None:
        return NO_VALUE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def as_value(value: Any) -> str:
    """A setting or a fact as the page shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_value, value)) or NO_VALUE
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return NO_VALUE if value is None else str(value)
