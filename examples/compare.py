"""Compare adapters on each party's held-out rows: `python -m examples.compare --help`.

An arm is an adapter, or one a party: in its path ``{party}`` stands for the party whose rows are scored. The model as
it came is always the first arm.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.rows import named
from examples.whole import Whole
from party.evaluate import Score
from splitfl.metrics import Result, write_results

BEFORE = "before"
Scores = dict[tuple[str, str], Score]
"""(arm, party) -> its figures."""


def compare(whole: Whole, tests: Mapping[str, Path], arms: Mapping[str, Path], *, max_length: int) -> Scores:
    """Score every arm on every party's rows."""
    found: Scores = {}
    for arm, pattern in {BEFORE: Path(), **arms}.items():
        for party, rows in tests.items():
            adapter = None if arm == BEFORE else Path(str(pattern).replace("{party}", party))
            with whole.tuned(adapter) as model:
                found[arm, party] = whole.score(model, rows, max_length=max_length)
    return found


def figures(scores: Scores) -> list[Result]:
    """All of them, with the loss before as reference of a loss after."""
    made = []
    for (arm, party), score in scores.items():
        for metric, value in score.facts().items():
            unit = {"loss": "nats", "counted": "tokens or rows"}.get(metric, "share")
            first = scores[BEFORE, party].loss if metric == "loss" and arm != BEFORE else None
            made.append(Result(case=f"{arm}/{party}", metric=metric, value=value, unit=unit, reference=first))
    return made


def table(scores: Scores) -> Table:
    """One line an arm, one column a party: loss and macro F1 of classifiers, loss and accuracy of language models."""
    parties = list(dict.fromkeys(party for _, party in scores))
    shown = Table("held out", *parties, "mean")

    def cell(one: list[Score]) -> str:
        second = [s.accuracy if s.macro_f1 is None else s.macro_f1 for s in one]
        return f"{sum(s.loss for s in one) / len(one):.3f}  {sum(second) / len(one):.3f}"

    for arm in dict.fromkeys(arm for arm, _ in scores):
        row = [scores[arm, party] for party in parties]
        shown.add_row(arm, *(cell([score]) for score in row), cell(row))
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.compare")
    parser.add_argument("--model", type=Path, required=True, help="directory of the whole model")
    parser.add_argument("--kit", type=Path, required=True, help="its kit")
    parser.add_argument("--test", action="append", required=True, metavar="PARTY=FILE", help="held-out rows")
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=ADAPTER")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    scores = compare(Whole(given.model, given.kit), named(given.test), named(given.arm), max_length=given.max_length)
    Console(width=120).print(table(scores))
    if given.json is not None:
        write_results(given.json, "examples.compare", vars(given), figures(scores))


if __name__ == "__main__":
    main()
