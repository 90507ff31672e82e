"""Whether an owner's margin is gone, in figures, in words and as a picture.

The margin is the loss of the holder's copy less the loss of the owner's model on the same held-out rows, in nats. Its
interval is a bootstrap over rows: both losses on the same draw, 2.5 and 97.5 per cent points of 2,000 draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy
from rich.console import Console
from rich.table import Table

from model_owner.distil_progress import standing_alone
from model_owner.margin_copy import RowScores
from splitfl.charts import Line, chart
from splitfl.files import replace_text
from splitfl.metrics import Result

_DRAWS, _AT_ONCE = 2000, 100
_FAR = 1000  # an extrapolation beyond so many times the most that was queried says nothing
HANDED_OUT, ROWS_ONLY = "as handed out", "own rows only"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of the holder's; a line of `points.json`."""

    asked: int | None
    """Tokens it was allowed to query; None for the emulator as it was handed out."""
    queried: int = 0
    """Tokens it did query."""
    loss: float
    accuracy: float
    distance: float
    """Relative error of the output in the trunk's place."""
    margin: float
    low: float
    high: float
    best_step: int = 0
    seconds: float = 0.0
    diverged: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        if self.asked is None:
            return HANDED_OUT
        return f"{self.queried:,} tokens queried" if self.queried else ROWS_ONLY


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the points come to."""

    gone: bool
    words: str
    tokens: float | None = None
    """Queried tokens at which it goes: measured where `gone`, else where the curve would get there; None if never."""


def margin_of(copy: RowScores, full: RowScores, seed: int) -> tuple[float, float, float]:
    """The margin in nats, and the ends of its interval."""
    gaps, counts, size = copy.losses - full.losses, full.counts, len(full.counts)
    draw, found = numpy.random.default_rng(seed), []
    for _ in range(_DRAWS // _AT_ONCE):
        times = draw.multinomial(size, numpy.full(size, 1 / size), size=_AT_ONCE)
        found.append((times @ gaps) / (times @ counts))
    low, high = numpy.percentile(numpy.concatenate(found), [2.5, 97.5])
    return float(gaps.sum() / counts.sum()), float(low), float(high)


# ---- the verdict


def verdict(points: Sequence[Point], gone_at: float) -> Verdict:
    """What the points say: first the emulator as handed out, then the copies, fewest queries first."""
    before, copies = points[0], points[1:]
    if before.low <= 0:
        how = "cannot be told from the model" if before.high >= 0 else "does better than the model"
        return Verdict(
            gone=True,
            words=f"There is no margin to lose: on these rows the emulator as handed out {how}.",
            tokens=0,
        )
    gone = next((one for one in copies if _is_gone(one, before, gone_at)), None)
    if gone is None:
        return _still_there(before, copies, gone_at)
    why = f"{100 * gone.margin / before.margin:.0f} % of it is left"
    if gone.margin > gone_at * before.margin:
        why += ", which on so few rows cannot be told from nothing"
    if not gone.queried:
        how = "It takes no query at all: tuning on rows like these is enough"
    else:
        holds = max((one.queried for one in copies if one.queried < gone.queried), default=0)
        how = f"It takes {gone.queried:,} queried tokens or fewer; with {holds:,} it was still there"
    words = f"The margin is gone: the emulator is worth as much as the model. {how} ({why})."
    return Verdict(gone=True, words=words, tokens=gone.queried)


def _is_gone(one: Point, before: Point, gone_at: float) -> bool:
    return one.low <= 0 or one.margin <= gone_at * before.margin


def _still_there(before: Point, copies: Sequence[Point], gone_at: float) -> Verdict:
    least = min(copies, key=lambda one: one.margin)
    most = max(one.queried for one in copies)
    words = (
        f"The margin is still there: {100 * least.margin / before.margin:.0f} % of it, {least.margin:.3f} nats, with "
        f"up to {most:,} queried tokens."
    )
    tokens = extrapolated([one for one in copies if one.queried], gone_at * before.margin)
    if tokens is None:
        words += " The curve does not say when it would go."
    elif tokens > _FAR * most:
        tokens = None
        words += f" As the curve goes, not within {_FAR:,} times as many."
    else:
        words += f" As the curve goes, it would be gone at about {tokens:,.0f}; that is extrapolated, not measured."
    return Verdict(gone=False, words=words, tokens=tokens)


def extrapolated(points: Sequence[Point], target: float) -> float | None:
    """Queried tokens at which a straight line through margin against log(tokens) comes down to `target` nats.

    None for fewer than two points, or a line that does not come down.
    """
    if len(points) < 2:
        return None
    logs, margins = [math.log(one.queried) for one in points], [one.margin for one in points]
    slope, start = numpy.polyfit(logs, margins, 1)
    if slope >= 0:
        return None
    at = (target - start) / slope
    return math.exp(at) if at < 700 else math.inf


# ---- what is said


def rows_of(points: Sequence[Point], full: RowScores, *, classifies: bool) -> list[list[str]]:
    """The table, heads first."""
    accuracy = ["accuracy"] if classifies else []
    heads = ["the holder's copy", "loss", *accuracy, "margin", "95 % of draws", "left", "distance"]
    whole = ["the model itself", f"{full.loss:.4f}", *([f"{full.accuracy:.3f}"] if classifies else []), "", "", "", "0"]
    table = [heads, whole]
    for one in points:
        left = one.margin / points[0].margin if points[0].margin > 0 else math.nan
        table.append(
            [
                one.name,
                f"{one.loss:.4f}",
                *([f"{one.accuracy:.3f}"] if classifies else []),
                f"{one.margin:+.4f}",
                f"{one.low:+.4f} to {one.high:+.4f}",
                f"{100 * left:.0f} %" if math.isfinite(left) else "",
                f"{one.distance:.4f}",
            ]
        )
    return table


def print_points(
    points: Sequence[Point], full: RowScores, found: Verdict, notes: Sequence[str], *, classifies: bool
) -> None:
    """The table, what it comes to, and what has to be known with it."""
    heads, *lines = rows_of(points, full, classifies=classifies)
    table = Table(title="on held-out rows, losses in nats", title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for line in lines:
        table.add_row(*line)
    Console(highlight=False).print(table)
    print(found.words)
    for note in notes:
        print(f"note     {note}")


def write_page(
    out: Path, points: Sequence[Point], full: RowScores, found: Verdict, notes: Sequence[str], *, classifies: bool
) -> None:
    """`report.md`, and `margin.svg` beside it.

    Raises:
        UsageError: matplotlib is missing; the page is written then, without the picture.
    """
    heads, *lines = rows_of(points, full, classifies=classifies)
    table = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    head = ["# How long the margin lasts", "", found.words, "", *("| " + " | ".join(line) + " |" for line in table), ""]
    body = [*head, *(f"- {note}" for note in notes)]
    replace_text(out / "report.md", "\n".join(body) + "\n")
    queried = [(one.queried, one) for one in points if one.queried]
    lines_drawn = [
        Line(label="margin", points=[(x, one.margin) for x, one in queried], dots=True),
        Line(label="as handed out", points=[(x, points[0].margin) for x, _ in queried], dots=False),
        Line(label=ROWS_ONLY, points=[(x, points[1].margin) for x, _ in queried], dots=False),
    ]
    drawn = chart("Margin in nats over queried tokens", "", lines_drawn)
    if drawn is not None:
        replace_text(out / "margin.svg", standing_alone(drawn))
        replace_text(
            out / "report.md",
            "\n".join([*head, "![margin over queried tokens](margin.svg)", "", *body[len(head) :]]) + "\n",
        )


def results(points: Sequence[Point], full: RowScores, found: Verdict, *, classifies: bool) -> list[Result]:
    """The figures of `--json`; losses stand beside the model's own, margins beside that of the emulator as it was."""
    figures = []
    for one in points:
        reference = None if one.asked is None else points[0].margin
        figures += [
            Result(case=one.name, metric="queried", value=one.queried, unit="tokens"),
            Result(case=one.name, metric="loss", value=one.loss, unit="nats", reference=full.loss),
            Result(case=one.name, metric="margin", value=one.margin, unit="nats", reference=reference),
            Result(case=one.name, metric="margin, low end", value=one.low, unit="nats"),
            Result(case=one.name, metric="margin, high end", value=one.high, unit="nats"),
            Result(case=one.name, metric="distance", value=one.distance, unit="relative squared error"),
            Result(case=one.name, metric="training", value=one.seconds, unit="s"),
            Result(case=one.name, metric="best step", value=one.best_step, unit="steps"),
        ]
        if classifies:
            figures.append(
                Result(case=one.name, metric="accuracy", value=one.accuracy, unit="share", reference=full.accuracy)
            )
    figures.append(Result(case="verdict", metric="margin gone", value="yes" if found.gone else "no", unit=""))
    figures.append(Result(case="verdict", metric="queried when it goes", value=found.tokens, unit="tokens"))
    return figures
