"""The section of docs/protocols.md about utility, as Markdown, from docs/utility.json. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from splitfl.bench.utility_cases import DESIGNS, REFERENCE, TASKS
from splitfl.bench.utility_table import FORMAL_CLAIM, Row, Spread, as_share, cells_of, score_name
from splitfl.report import NO_VALUE

PICTURE = "images/utility.svg"
_MODELS = {"minilm": "all-MiniLM-L6-v2", "embedded": "the embedded language model"}
_INSTEAD = {"int4": "without noise, in int4,", "decorrelate-0": "without noise or decorrelation, in int8,"}
_ENOUGH = 0.9  # share of the gain that counts as kept

_HEAD = """\
## What protection costs in utility

Measured with real runs of `splitfl tune` against an owner process with CURVE keys: every design, several sizes of
noise, {seeds}. The reference, *full LoRA*, trains LoRA on all layers of the model in one piece, on the same rows,
in the same batches, for as many steps, and is scored by the same code. *Gain kept* is the share of what the reference
gains over the untuned model that a run gains too, seed by seed: 1 is all of it, 0 nothing, and below 0 the run is worse
than the untuned model without noise. Above 1 it learns more than the reference does in the same few steps. Given are
the median over the seeds and, as a range, the least and the greatest. Held-out rows go through the same noise as
training rows, since a tuned model is used through the same cut.

Noise is discrete Gaussian, on activations, after each row was clipped. Its size is given as *r/sigma*: r is the norm of
one token's activation at the cut (root mean square over training rows, before training), sigma the standard deviation
of the noise on each number. Rows are clipped to r times the square root of a median row's tokens. `guarded-online` also
decorrelates, and codes what it sends in int8 where no noise takes its place; *int8 alone* is this design without the
decorrelation.

*Recovery* is the share of tokens that a formula expects an attacker to name who takes the nearest of all embeddings:
from one release, and from all releases of a training row in the run, since fresh noise is averaged away
([threat-model.md](threat-model.md) has what attacks recover without noise). It is a yardstick for the size of the noise
and no bound: it knows no language, and tokens at these cuts have passed a layer or two.
"""

_GUARANTEES = """\
### What is a guarantee here

Only the rows called *formal* are one:
{claim}.
There r/sigma says how much noise that takes. Lengths and masks cross as they are.

All other rows, and every figure called recovery, are empirical: they say what happened in these runs and what a formula
expects of one simple attack, and promise nothing about another attacker. Quantisation and decorrelation by themselves
bound nobody.
"""

_AGAIN = """\
### Measuring it again

```sh
make utility
```

It runs `splitfl bench utility`, going on where an earlier run was broken off, and writes `docs/utility.json`, the
picture and this page. `splitfl bench utility --quick` shows in a few minutes that it works; its figures mean nothing.
"""


def section(record: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the section; `record` is what docs/utility.json holds."""
    rows = [row_from(entry) for entry in record["rows"]]
    tasks = list(dict.fromkeys(row.task for row in rows))
    yield _HEAD.format(seeds=_seeds(max(row.seeds for row in rows)))
    yield from _setup(record, tasks)
    yield f"![Score against r/sigma, for each design and task]({PICTURE})\n"
    for task in tasks:
        yield from _table(task, [row for row in rows if row.task == task])
    yield "### What the tables show\n"
    yield from _findings(tasks, rows)
    yield _GUARANTEES.format(claim=FORMAL_CLAIM)
    yield _AGAIN


def row_from(entry: Mapping[str, Any]) -> Row:
    """A setting as docs/utility.json holds it."""
    spreads = {name: Spread(**entry[name]) for name in ("score", "loss")}
    kept = None if entry["kept"] is None else Spread(**entry["kept"])
    return Row(**{**entry, **spreads, "kept": kept})


def _cells(*words: str) -> str:
    return "| " + " | ".join(words) + " |"


def _setup(record: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[str]:
    yield _cells("task", "model", "layers of the party", "training rows", "held-out rows", "steps x batch",
                 "learning rate", "r", "rows beyond the clip")  # fmt: skip
    yield _cells("---", "---", *["---:"] * 7)
    for name in tasks:
        task, told = TASKS[name], record["tasks"][name]
        yield _cells(
            f"*{name}*: {task.title}", _MODELS[task.model], f"{task.bottom} below, {task.top} above",
            f"{told['training rows']:,.0f}", f"{told['held-out rows']:,.0f}",
            f"{told['steps']:.0f} x {told['rows of a batch']:.0f}", f"{told['learning rate']:g}", f"{told['r']:.1f}",
            as_share(told["rows beyond the clip"]),
        )  # fmt: skip
    machine, shipped = record["machine"], [name for name in tasks if record["tasks"][name]["rows come with splitfl"]]
    outside = [name for name in tasks if name not in shipped]
    yield (
        "\nLearning rates were chosen by hand with the reference on seed 0, and every design uses them as they are, so "
        "none was tuned for its noise. LoRA has rank 8 on every linear module of the layers that are trained. Classes "
        "are equally frequent in the rows. "
        + (f"The rows of {_and(shipped)} come with splitfl. " if shipped else "")
        + (
            f"Those of {_and(outside)} do not: they are read from the folder that `SPLITFL_SHARED` names. "
            if outside
            else ""
        )
        + f"Machine: {machine['processor']}, {machine['cpu_count']} cores, torch {machine['torch']}, one thread a "
        f"process, {record['settings']['workers']} runs at a time; so times are for comparing within a table.\n"
    )


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _and(names: Sequence[str]) -> str:
    words = [f"*{name}*" for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _table(task: str, rows: Sequence[Row]) -> Iterator[str]:
    direction = "higher" if TASKS[task].higher_is_better else "lower"
    yield f"### {task.capitalize()}: {TASKS[task].title}\n"
    yield f"Score: held-out {score_name(TASKS[task])}, {direction} is better; {rows[0].before:.3f} before training.\n"
    yield _cells("design", "noise", "r/sigma", "score", "range", "gain kept", "range", "recovery, one release",
                 "recovery, the run", "sent", "received", "time")  # fmt: skip
    yield _cells("---", "---", *["---:"] * 10)
    for row in rows:
        design, *others = cells_of(row)
        yield _cells(design if row.design == REFERENCE else f"`{design}`", *others)
    yield ""


def _findings(tasks: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    for task in tasks:
        for design in DESIGNS:
            mine = [row for row in rows if (row.task, row.design) == (task, design)]
            if mine:
                yield f"- *{task}*, `{design}`: {_finding(mine)}"
    named = [row.once for row in rows if row.once is not None and not row.formal]
    if named:
        yield (
            f"\nAt every size of noise that was tried but the formal one, the formula expects at least "
            f"{math.floor(1000 * min(named)) / 10:g} % of tokens to be named from one release."
        )
    most = max(row.seeds for row in rows)
    if fewer := sum(row.seeds < most for row in rows):
        yield f"\n{fewer} of the {len(rows)} settings have been run with fewer than {_seeds(most)}."
    yield (
        f"\nA level counts as keeping the gain where the median is at least {_ENOUGH:g} at it and at less noise. "
        f"The range over seeds says how much of a difference between two rows is chance; with few held-out rows it is "
        "wide.\n"
    )


def _finding(rows: Sequence[Row]) -> str:
    """What one design keeps on one task, in a sentence made from its rows."""
    plain = next((row for row in rows if row.level == "none"), None)
    said = [] if plain is None else [f"without noise the median of the gain kept is {_kept(plain)}"]
    noisy = sorted((row for row in rows if row.ratio is not None and not row.formal), key=lambda row: -(row.ratio or 0))
    last = None
    for row in noisy:
        if row.kept is None or row.kept.median < _ENOUGH:
            break
        last = row
    if last is not None:
        said.append(
            f"noise keeps at least {_ENOUGH:g} down to r/sigma {last.ratio:g}, where the formula expects "
            f"{as_share(last.once)} of tokens to be named from one release, {as_share(last.whole_run)} from the run"
        )
    elif noisy:
        said.append(f"no noise that was tried keeps {_ENOUGH:g}")
    if noisy and noisy[-1] is not last:
        said.append(f"at r/sigma {noisy[-1].ratio:g} it is {_kept(noisy[-1])}")
    said += [f"{_INSTEAD[row.level]} it is {_kept(row)}" for row in rows if row.level in _INSTEAD]
    said += [f"with the formal noise (r/sigma {row.ratio:.2g}) it is {_kept(row)}" for row in rows if row.formal]
    return "; ".join(said) + "."


def _kept(row: Row) -> str:
    return NO_VALUE if row.kept is None else f"{row.kept.median:.2f}"
