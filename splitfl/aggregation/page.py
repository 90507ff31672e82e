"""`python -m splitfl.aggregation.page`: docs/aggregation.md, written from the rules' own records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from splitfl.aggregation.rule import Rule, Step
from splitfl.aggregation.rules import DEFAULT_RULE, RULES
from splitfl.bench.rules_section import section as compared_section

_COMPARED = Path(__file__).resolve().parents[2] / "docs" / "rules.json"  # not part of an installed package

_HEAD = f"""\
# Combining adapters

Written by `make docs` from the records in `splitfl/aggregation/rules/`. A combination that a record speaks against is
refused with the reason given below.

The parties of a round train LoRA factors A_k and B_k of each module; the change of its weight is s B_k A_k with s =
alpha/r. What one would like to have is the weighted mean of these changes. It has up to n times the rank of one
adapter, so every rule is a way to cope. How the updates are summed is a second, independent choice.

The default is `{DEFAULT_RULE}`.

- **exact**: the model's change is the weighted mean of the parties' changes, up to rounding. Of every other rule each
  round's error is measured where all updates are at hand, as Frobenius norm relative to that mean.
- **sum alone**: the coordinator needs nothing but one weighted mean, so it may be masked or encrypted.
- **linear**: the next factors are means of what was sent, with nothing done to them afterwards.
- **mixed ranks**: parties may choose ranks of their own, up to the federation's.
- **noise**: noise for differential privacy goes with it.
- **same bits**: every machine computes the same bits; elsewhere parties compare what they get up to rounding.

## The scaling trap

alpha/r is not in the factors that PEFT stores. Where it differs between parties, a mean of their B belongs to no model:
with alpha = 16, a party of rank 4 and one of rank 16 differ by a factor of 4. Here B is brought to the federation's
scale before anything is added, and back to the party's own when it is loaded. Where all have one scale nothing is
multiplied, so that one party alone gets its own adapter back, bit for bit.
"""

_PROPERTIES = ("exact", "sum alone", "linear", "mixed ranks", "noise", "same bits")


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *_table(), *(line for rule in RULES.values() for line in _section(rule)), *_compared()])


def _compared() -> Iterator[str]:
    """What `splitfl bench rules` measured, where it has been run."""
    if _COMPARED.is_file():
        yield from compared_section(json.loads(_COMPARED.read_text(encoding="utf-8")))


def _table() -> Iterator[str]:
    yield "## Rules\n"
    yield _row("rule", "what it does", "trains", "sends", *_PROPERTIES)
    yield _row(*["---"] * (4 + len(_PROPERTIES)))
    for rule in RULES.values():
        has = (rule.exact, not rule.needs_all, rule.linear, not rule.one_rank, not rule.no_dp, rule.same_bits)
        told = (_over_rounds(rule, "trains"), _over_rounds(rule, "sends"), *("yes" if yes else "" for yes in has))
        yield _row(f"[`{rule.name}`](#{rule.name})", rule.says, *told)
    yield ""


def _over_rounds(rule: Rule, what: str) -> str:
    """One word, or the words of the first rounds in the order they come."""
    words = [str(getattr(rule, what)(round)) for round in range(8)]
    return ", then ".join(dict.fromkeys(words))


def _section(rule: Rule) -> Iterator[str]:
    yield f"## `{rule.name}`\n"
    yield f"Source: {rule.source}.\n"
    text = (type(rule).__doc__ or "").strip()
    yield from _unindented(text)
    yield ""
    yield from (f"- {line}" for line in _against(rule))
    yield ""
    if len(rule.steps(0)) > 1:
        yield f"Sums of the first round: {'; '.join(_told(step) for step in rule.steps(0))}.\n"
    if len(rule.steps(1)) > 1:
        yield f"Sums of later rounds: {'; '.join(_told(step) for step in rule.steps(1))}.\n"
    options = ", ".join(f"`{field.name}` = {getattr(rule, field.name)!r}" for field in fields(rule))
    if options:
        yield f"Options: {options}.\n"


def _against(rule: Rule) -> Iterator[str]:
    """Why the properties that it lacks are lacking."""
    for what, reason in (
        ("Not under a protected sum", rule.needs_all and f"it {rule.needs_all}"),
        ("One rank for all", rule.one_rank),
        ("Not with differential privacy", rule.no_dp),
        ("No model of all", rule.no_global),
    ):
        if reason:
            yield f"{what}: {reason}."


def _told(step: Step) -> str:
    return f"`{step.name}` ({step.does}, {step.sends})"


def _unindented(text: str) -> Iterator[str]:
    """A docstring as Markdown: what is drawn inside it stays drawn."""
    for number, line in enumerate(text.splitlines()):
        yield line.removeprefix("    ") if number else line


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
