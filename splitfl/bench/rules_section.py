"""The section of docs/aggregation.md that compares the rules, as Markdown, from docs/rules.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from splitfl.aggregation.rules import RULES
from splitfl.bench.rules_cases import ALPHA, HEAD, LOCAL, MIXED, POOLED, RANK, SAME, SAME_AS, TASKS
from splitfl.bench.rules_table import COLUMNS, Row, Spread, cells_of, error_words, score_name

PICTURE = "images/rules.svg"
_MODELS = {"minilm": "all-MiniLM-L6-v2", "embedded": "the embedded language model"}
_ROWS = {
    "answers": "each party holds what one source has written, so numbers of rows differ",
    "polarity": "the first party has one positive row in ten, the last nine in ten; held-out rows likewise",
}

_HEAD = """\
## All rules compared

Each rule in a federation of {parties} parties: {rounds} rounds, {steps} steps of each party in a round, {seeds}. All
rules have the same parties, rows, batches, head and first seed of factors; the parties train for real, in one process
without a network. AdamW without weight decay begins anew in every round; the rate falls from round to round in equal
steps. LoRA has rank {rank}, alpha {alpha}, on every linear module of the last layers of the model. A classifier reads
the mean of the tokens; its head is trained and averaged with the adapter, at a rate of its own that is the same for
every rule. Weights are numbers of training rows. `fed-sb` and `fedlrt` take their gradients from the batches of the
round.

References are trained in the same run. *{local}*: every party by itself, for as many steps, with nothing combined.
*{pooled}*: one model on the rows of all, for as many steps, of as many rows as the parties' batches have together.
*{head}*, for the classifier: the head is trained and averaged, and the adapter is left as it is; what a rule does
better than this is the adapter's.

Learning rates were chosen by validation rows that nobody trains on, once for each task and each kind of thing that is
trained: three rates on seed 0 with `fedit` (for rules that train both factors), `rolora` (one factor) or `fed-sb` (a
core); `fedlrt` and the references with themselves. The one with the least loss after the last round was taken for all
seeds. *lowest* and *highest* mark a rate at an end of its grid: a rate beyond it was not tried. Scores are those after
the last round; no better round was picked.
"""

_COLUMNS = """\
- *all rows*: held-out score on the rows of all parties, every party counting alike; median over the seeds, with the
  least and the greatest. Where there is no model of all (`fedsa`, {local}), the mean of the parties' models, each on
  everybody's rows.
- *own rows*: the same, each party's rows with the model that this party has. One model for all scores the same twice.
- *worst party*: the party that fares worst on its own rows.
- *after own steps*: on own rows, right after the local steps of the last round, before they are combined.
- *error*: aggregation error as above, of the first and of the last round. What a rule leaves out in one round is not
  lost for good: the parties train on from there.
- *up*, *down*: floats that one party sends and gets in a round, mean over the rounds. Rules that need every update send
  back the whole state, with all that was merged so far.
- *aggregator*: processor time from the parties' vectors to the next state, median of the rounds.
- *collapsed*: seeds that, by validation, ended with less than half of the gain of their best round; *no gain*: seeds
  that never were better than the untuned model.
"""

_LIMITS = """\
### What the numbers do not show

- Small models, few rows, a few short rounds, {seeds}: which rule is ahead may change with any of them. Ranges that
  overlap say nothing about an order; held-out rows are few ({held}), and the range over seeds does not hold their
  chance.
- One rate for each kind of rule, from three; no optimiser state is kept between rounds. A rule tuned by itself could do
  better: `fra-then-ffa` changes in the middle here, all other options are the defaults. `hetlora` runs without its
  self-pruning. `fedlrt` sees every batch of a round twice, `fed-sb` those of the first one thrice.
- Weights count rows and the scores count parties alike, so a rule with other weights, as `hetlora`, can gain by that
  alone where parties differ in size.
- No noise, no masks, no dropouts, no late parties. Rules for differential privacy (`ffa`, `fedsvd`) are not here for
  what they are good at.
- `{same}` computes what `{other}` does, and is not listed twice.
"""

_AGAIN = """\
### Measuring it again

```sh
make rules
```

It runs `splitfl bench rules`, going on where an earlier run was broken off, and writes `docs/rules.json`, the picture
and this page. `splitfl bench rules --quick` shows in a minute that it works; its figures mean nothing.
"""


def section(record: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the section; `record` is what docs/rules.json holds."""
    rows = [row_from(entry) for entry in record["rows"]]
    tasks = list(dict.fromkeys(row.task for row in rows))
    first = record["tasks"][tasks[0]]
    seeds = _seeds(max(row.seeds for row in rows))
    yield _HEAD.format(
        parties=f"{first['parties']:.0f}", rounds=f"{first['rounds']:.0f}", steps=f"{first['local steps']:.0f}",
        seeds=seeds, rank=RANK, alpha=ALPHA, local=LOCAL, pooled=POOLED, head=HEAD,
    )  # fmt: skip
    yield from _setup(record, tasks)
    yield _COLUMNS.format(local=LOCAL)
    yield f"![Held-out scores of each rule, and aggregation error by round]({PICTURE})\n"
    for task in tasks:
        yield from _tables(task, [row for row in rows if row.task == task])
    yield "### What the tables show\n"
    for task in tasks:
        yield from _findings(task, [row for row in rows if row.task == task])
    most = max(row.seeds for row in rows)
    if fewer := sum(row.seeds < most for row in rows):
        yield f"\n{fewer} of the {len(rows)} settings have been run with fewer than {seeds}."
    yield ""
    held = ", ".join(f"{record['tasks'][task]['held-out rows']:.0f} of *{task}*" for task in tasks)
    same, other = next(iter(SAME_AS.items()))
    yield _LIMITS.format(seeds=seeds, held=held, same=same, other=other)
    yield _AGAIN


def row_from(entry: Mapping[str, Any]) -> Row:
    """A row as docs/rules.json holds it."""
    spreads = {name: Spread(**entry[name]) for name in ("every", "own", "worst", "after")}
    series = {name: tuple(entry[name]) for name in ("validation", "errors")}
    return Row(**{**entry, **spreads, **series})


def _cells(*words: str) -> str:
    return "| " + " | ".join(words) + " |"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _setup(record: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[str]:
    yield _cells("task", "model", "rows of the parties", "training rows", "of a party", "validation rows",
                 "held-out rows", "rows of a batch", "values of an adapter")  # fmt: skip
    yield _cells("---", "---", "---", *["---:"] * 6)
    for name in tasks:
        task, told = TASKS[name], record["tasks"][name]
        yield _cells(
            f"*{name}*: {task.title}", f"{_MODELS[task.model]}, last {task.tuned_layers} layers", _ROWS[name],
            f"{told['training rows']:,.0f}",
            f"{told['fewest training rows of a party']:.0f} to {told['most training rows of a party']:.0f}",
            f"{told['validation rows']:.0f}", f"{told['held-out rows']:.0f}", f"{told['rows of a batch']:.0f}",
            f"{told['values of an adapter']:,.0f}",
        )  # fmt: skip
    machine = record["machine"]
    lengths = ", ".join(f"{TASKS[name].max_length} tokens in *{name}*" for name in tasks)
    outside = [f"*{name}*" for name in tasks if not record["tasks"][name]["rows come with splitfl"]]
    yield (
        f"\nRows are cut at {lengths}; those of which no answer would be left are not counted above. "
        + (
            f"The rows of {' and '.join(outside)} are read from the folder that `SPLITFL_SHARED` names. "
            if outside
            else ""
        )
        + f"Machine: {machine['processor']}, {machine['cpu_count']} cores, torch {machine['torch']}, one thread.\n"
    )


def _tables(task: str, rows: Sequence[Row]) -> Iterator[str]:
    direction = "higher" if TASKS[task].higher_is_better else "lower"
    yield f"### {task.capitalize()}\n"
    yield f"Score: held-out {score_name(task)}, {direction} is better; {rows[0].before:.3f} before training.\n"
    for ranks in (SAME, MIXED):
        mine = [row for row in rows if row.ranks == ranks]
        if not mine:
            continue
        if ranks == MIXED:
            yield f"\nWith ranks that differ (8, 4, 2, 8, and the federation's is {RANK}); rates as above:\n"
        yield _cells(*COLUMNS)
        yield _cells("---", *["---:"] * (len(COLUMNS) - 1))
        for row in mine:
            name, *others = cells_of(row)
            yield _cells(f"*{name}*" if row.reference else f"[`{name}`](#{name})", *others)
    yield ""


# ---- in words, made from the rows


def _findings(task: str, rows: Sequence[Row]) -> Iterator[str]:
    """What one task's tables say; each sentence is made from the rows and promises no more."""
    rules = [row for row in rows if row.ranks == SAME and not row.reference]
    yield f"- *{task}*: {_order(task, [row for row in rules if not RULES[row.rule].no_global])}"
    for row in rows:
        if row.rule == LOCAL:
            yield f"- *{task}*: {_against_local(task, row, rules)}"
    yield f"- *{task}*: {_errors(rules)}"
    broken = [f"`{row.rule}` ({row.ranks})" for row in rows if row.collapsed or row.idle]
    if broken:
        yield f"- *{task}*: collapsed or never gained on some seed: {', '.join(broken)}."
    mixed = [row for row in rows if row.ranks == MIXED]
    if mixed:
        best = _sorted(task, mixed)
        alike = {row.rule: row for row in rules}
        told = ", ".join(
            f"`{row.rule}` {row.every.median:.3f}" + (f" ({alike[row.rule].every.median:.3f} with one rank)"
                                                      if row.rule in alike else "")
            for row in best
        )  # fmt: skip
        yield f"- *{task}*, mixed ranks: {told}."


def _sorted(task: str, rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.every.median, reverse=TASKS[task].higher_is_better)


def _order(task: str, rows: Sequence[Row]) -> str:
    ordered = _sorted(task, rows)
    best = ordered[0]
    overlapping = [row for row in ordered[1:] if _overlap(best.every, row.every)]
    said = (
        f"of the rules with one model, `{best.rule}` has the best median on the rows of all ({best.every.median:.3f})"
    )
    if best.seeds == 1:
        said += "; with one seed there is no range to tell that from chance"
    elif overlapping:
        said += f"; the ranges of {len(overlapping)} of the other {len(ordered) - 1} overlap with its own"
    return f"{said}. Last is `{ordered[-1].rule}` ({ordered[-1].every.median:.3f})."


def _overlap(one: Spread, other: Spread) -> bool:
    return one.low <= other.high and other.low <= one.high


def _against_local(task: str, local: Row, rules: Sequence[Row]) -> str:
    up = TASKS[task].higher_is_better

    def better(value: float, than: float) -> bool:
        return value > than if up else value < than

    ahead = sum(better(row.every.median, local.every.median) for row in rules)
    own = [row for row in rules if better(row.own.median, local.own.median)]
    named = ", ".join(f"`{row.rule}`" for row in own) or "none"
    return (
        f"on the rows of all, {ahead} of {len(rules)} rules have a better median than parties by themselves "
        f"({local.every.median:.3f}); on the parties' own rows ({local.own.median:.3f}) better are: {named}."
    )


def _errors(rules: Sequence[Row]) -> str:
    inexact = [row for row in rules if row.errors and not RULES[row.rule].exact]
    if not inexact:
        return "no rule with an error was run."
    ordered = sorted(inexact, key=lambda row: statistics.fmean(row.errors))
    told = ", ".join(f"`{row.rule}` {error_words(statistics.fmean(row.errors))}" for row in ordered)
    return f"mean aggregation error over the rounds: {told}; the other rules are exact up to rounding."
