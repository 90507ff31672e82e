"""The section of docs/offsite.md that compares the ways, as Markdown, from docs/offsite.json; measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from splitfl.bench.offsite_cases import BOTTOM, FULL_TUNED, OFFSITE, RANK, SPLIT, TASKS, TOP
from splitfl.bench.offsite_costs import LENGTH, ROWS
from splitfl.bench.offsite_summary import (
    GAIN,
    GAP,
    MARGIN,
    SHARE,
    SHARE_REACH,
    SPEED_REACH,
    Row,
    Spread,
)
from splitfl.bench.offsite_table import cells_of, cost_cells, cost_line, score_name
from splitfl.report import NO_VALUE, as_duration, as_size

BEGIN, END = "<!-- offsite table -->", "<!-- end of the offsite table -->"
PICTURE = "images/offsite.svg"
_ROUNDING = 1e-6  # a mean of differences that cancel out need not be 0 exactly

_HEAD = """\
Written by `python -m splitfl.bench.offsite_page` from figures of `splitfl bench offsite`. Every training has LoRA of
rank {rank} on all linear modules of the layers that it tunes, the same rows in the same batches, and as many steps:

- *full zero-shot*, *emulator zero-shot*: nothing is tuned;
- *emulator tuned*: what the data holder has after `splitfl tune --protocol guarded-offline`, emulator and all;
- *plug-in*: the same adapter in the full model, by `splitfl plugin`;
- *full fine-tuning*: LoRA on all layers of the model in one piece, as where one person holds both sides;
- *split*: the layers of the plug-in, tuned through the true trunk by `splitfl tune --protocol split`.

Learning rates are each training's own, out of {rates}: the one with the least loss on a sixth of the training
rows, with one seed, which are trained on only afterwards. Held-out rows are not looked at for that. For the offsite
training that loss is the emulated model's, since its holder sees no other. Emulators are distilled on public text,
which is not of the tasks. A classifier begins with a head drawn at random, so before training it guesses.

*Owner's margin* is plug-in over emulator tuned, *utility gap* full fine-tuning over plug-in, and *share* what the
plug-in gains over the full model's zero-shot, of what full fine-tuning gains. Differences are written so that above 0
the first is the better one. Given are means over the seeds, and in brackets the least and the greatest.
"""

_AGAIN = """\
To measure it again, with the second model trained first (`examples/pretrain/gpt2.toml`):

```sh
make offsite
```

`splitfl bench offsite --quick` shows in a few minutes that it works; its figures mean nothing.
"""


def section(record: Mapping[str, Any]) -> Iterator[str]:
    """The lines between the markers; `record` is what docs/offsite.json holds."""
    rows = [row_from(entry) for entry in record["rows"]]
    models = list(dict.fromkeys(row.model for row in rows))
    yield _HEAD.format(rank=RANK, rates=_and([f"{rate:g}" for rate in record["rates"]]))
    yield from _tasks(record)
    yield f"![Scores of the six ways, for each model and task]({PICTURE})\n"
    for model in models:
        yield from _model(record, model, [row for row in rows if row.model == model])
    yield from _met(record, models)
    yield from _said(record)
    yield _AGAIN.rstrip("\n")


def row_from(entry: Mapping[str, Any]) -> Row:
    """A way as docs/offsite.json holds it."""
    return Row(**{**entry, "score": Spread(**entry["score"]), "loss": Spread(**entry["loss"])})


def _cells(*words: str) -> str:
    return "| " + " | ".join(words) + " |"


def _tasks(record: Mapping[str, Any]) -> Iterator[str]:
    yield _cells("task", "rows are", "training rows", "held-out rows", "steps x batch")
    yield _cells("---", "---", *["---:"] * 3)
    for name, told in record["tasks"].items():
        where = "with splitfl" if told["rows come with splitfl"] else f"shared, `{TASKS[name].shared}`"
        yield _cells(
            f"*{name}*: {TASKS[name].title}", where, f"{told['training rows']:,.0f}", f"{told['held-out rows']:,.0f}",
            f"{told['steps']:.0f} x {told['rows of a batch']:.0f}",
        )  # fmt: skip
    yield ""


def _model(record: Mapping[str, Any], model: str, rows: Sequence[Row]) -> Iterator[str]:
    emulators = {case: facts for case, facts in record["emulators"].items() if case.startswith(f"{model} / ")}
    yield f"#### The model *{model}*\n"
    for case, facts in emulators.items():
        yield f"- {_emulator(case.rpartition(' ')[2], facts)}"
    yield ""
    yield _cells("task", "way", "score", "range", "loss, nats", "received", "sent", "time")
    yield _cells("---", "---", *["---:"] * 6)
    for row in rows:
        yield _cells(f"*{row.task}*", *cells_of(row))
    scores = "; ".join(f"*{task}*: {score_name(TASKS[task])}" for task in dict.fromkeys(row.task for row in rows))
    yield (
        f"\nScores: {scores}. Received are kit and emulator, or kit and what the owner sends; times are of two "
        "evaluations and the training, one thread a process, on a machine that had other work.\n"
    )
    yield _cells("task", MARGIN, GAIN, GAP, "share", f"plug-in best of the three, share {SHARE_REACH:.0%} or more")
    yield _cells("---", *["---:"] * 4, "---")
    for task in dict.fromkeys(row.task for row in rows):
        found = {name: Spread(**one) for name, one in record["comparisons"].get(f"{model} / {task}", {}).items()}
        if MARGIN in found:
            yield _cells(f"*{task}*", *(_spread(found[name]) for name in (MARGIN, GAIN, GAP)), _share(found),
                         _reached(found))  # fmt: skip
    yield ""
    yield from _costs(record, model)


def _emulator(kind: str, facts: Mapping[str, Any]) -> str:
    said = (
        f"emulator for {kind}: {facts['layers given']:.0f} of the trunk's {facts['layers of the trunk']:.0f} layers "
        f"({BOTTOM} layers below and {TOP} above the cut), {facts['parameters given']:,.0f} parameters, "
        f"{as_size(facts['emulator'])}, beside a kit of {as_size(facts['kit'])}"
    )
    if facts.get("distilled steps"):
        said += f"; the state of step {facts['distilled steps']:.0f} of its distillation"
        said += f" ({as_duration(facts['distillation'])})"
    stages = [("full model", "the full model"), ("layers left out", "layers left out"), ("as handed out", "handed out")]
    losses = [f"{word} {facts[f'public loss, {s}']:.3f}" for s, word in stages if f"public loss, {s}" in facts]
    if losses:
        said += f"; loss on held-out public text: {', '.join(losses)} nats"
    return said + "."


def _spread(one: Spread) -> str:
    return f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def _share(found: Mapping[str, Spread]) -> str:
    if SHARE not in found:
        return NO_VALUE
    one = found[SHARE]
    return f"{one.mean:.1%} ({one.low:.1%} to {one.high:.1%})"


def reached(found: Mapping[str, Spread]) -> tuple[bool, bool]:
    """Whether the plug-in is on average better than emulator tuned and zero-shot, and whether its share is enough."""
    better = min(found[MARGIN].mean, found[GAIN].mean) > _ROUNDING
    return better, SHARE in found and found[SHARE].mean >= SHARE_REACH


def _reached(found: Mapping[str, Spread]) -> str:
    better, enough = reached(found)
    return f"{'yes' if better else 'no'}, {'yes' if enough else 'no'}"


def _costs(record: Mapping[str, Any], model: str) -> Iterator[str]:
    lines = cost_cells(record["costs"], model)
    if not lines:
        return
    yield _cells("training", "speed", "memory of model and training", "FLOPs a token")
    yield _cells("---", "---:", "---:", "---:")
    for cells in lines:
        yield _cells(*cells)
    yield f"\nAs measured: {cost_line(record['costs'], model)}.\n"


def _met(record: Mapping[str, Any], models: Sequence[str]) -> Iterator[str]:
    """On how many tasks of each model what is aimed at was reached."""
    for model in models:
        found = [
            {name: Spread(**one) for name, one in compared.items()}
            for case, compared in record["comparisons"].items()
            if case.startswith(f"{model} / ") and MARGIN in compared
        ]
        better, enough = (sum(reached(one)[which] for one in found) for which in (0, 1))
        yield (
            f"- *{model}*: the plug-in is better than the tuned emulator and than zero-shot on {better} of "
            f"{len(found)} tasks, and has {SHARE_REACH:.0%} of full fine-tuning's gain or more on {enough}."
        )
    yield ""


def _said(record: Mapping[str, Any]) -> Iterator[str]:
    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    told = {model: _machine_in_words(machine_of(record, model)) for model in models}
    where = (
        "; ".join(f"*{model}*: {told[model]}" for model in models) if len(set(told.values())) > 1 else told[models[0]]
    )
    yield (
        f"Speed and memory: batches of {ROWS} rows of {LENGTH} tokens; each training in a process of its own with one "
        "thread, their steps in turn, the median of them; memory is the peak less what the process held before it had "
        "a model. FLOPs are those of matrix products and attention, forward and backward. A speed of "
        f"{SPEED_REACH:g} times full LoRA's is aimed at. Machine: {where}.\n"
    )
    if record["chosen"]:
        names = {OFFSITE: "offsite", FULL_TUNED: "full", SPLIT: "split"}
        chosen = [
            f"{case} {', '.join(f'{names[t]} {rate:g}' for t, rate in one.items())}"
            for case, one in record["chosen"].items()
        ]
        yield f"Learning rates that were chosen: {'; '.join(chosen)}.\n"
    yield (
        "For comparison, published for OPT-1.3B with half of its trunk distilled (perplexity on WikiText): zero-shot "
        "31.48, plug-in 13.15, full fine-tuning 12.52 (Xiao, Lin and Han, 2023).\n"
    )


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def machine_of(record: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """Where a model's figures were measured: all on one machine, unless figures were kept from another."""
    found: Mapping[str, Any] = record.get("machines", {}).get(model, record["machine"])
    return found


def _machine_in_words(machine: Mapping[str, Any]) -> str:
    device = machine["accelerator"] or machine["processor"]
    return f"{device}, {machine['cpu_count']} cores, torch {machine['torch']}"
