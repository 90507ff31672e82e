"""At a party: let the tuned model propose edits, run the party's own hook on each, and queue them for review.

See `python -m examples.code_migration.propose --help`. Nothing of this leaves the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.code_migration.hook import command, run_hook
from examples.code_migration.review_queue import Proposal, Queue, acceptance
from examples.code_migration.syntax import unit
from examples.rows import Record, lines
from examples.whole import Whole
from splitfl.errors import SplitflError
from splitfl.metrics import Result, write_results


def proposals(
    rows: Sequence[Record], answers: Sequence[str], words: Sequence[str], *, limit_s: float
) -> list[Proposal]:
    """Check each answer in its method with the hook."""
    found = []
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), 1):
        made = Proposal(
            id=f"p{number:03}", rule=row["rule"], method=row["method"], start=row["start"], end=row["end"],
            proposed=answer, expected=row.get("completion"), verdict="failed",
        )  # fmt: skip
        outcome = run_hook(words, unit(made.after), limit_s=limit_s)
        found.append(Proposal(**{**vars(made), "verdict": outcome.verdict, "said": outcome.output}))
    return found


def table(found: Sequence[Proposal]) -> Table:
    """Acceptance by migration."""
    shown = Table("migration", "edits", "hook passed", "exact", "similarity", "unchanged")
    for rule in [*sorted({one.rule for one in found}), None]:
        own = [one for one in found if rule in (one.rule, None)]
        values = acceptance(own)
        shown.add_row(rule or "all", str(len(own)), *(f"{values[c]:.2f}" for c in
                      ("hook passed", "exact", "similarity", "unchanged")))  # fmt: skip
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.code_migration.propose")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="without one, the model as it came")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--queue", type=Path, required=True, help="a new file")
    parser.add_argument("--hook", help="command line; the file to check is added to it. Default: does it parse?")
    parser.add_argument("--hook-limit", type=float, default=30.0, help="seconds")
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.queue.exists():
        parser.error(f"{given.queue} exists, and decisions of people may stand in it; name another file")
    words, rows, whole = command(given.hook), lines(given.rows), Whole(given.model, given.kit)
    with whole.tuned(given.adapter) as model:
        answers = whole.answers(model, [row["prompt"] for row in rows], max_new_tokens=given.max_new_tokens)
    queue = Queue(given.queue)
    queue.proposals = proposals(rows, answers, words, limit_s=given.hook_limit)
    queue.write()
    Console(width=100).print(table(queue.proposals))
    if given.json is not None:
        results = [
            Result(case="all", metric=metric, value=value, unit="share")
            for metric, value in acceptance(queue.proposals).items()
        ]
        write_results(given.json, "examples.code_migration.propose", vars(given), results)


if __name__ == "__main__":
    try:
        main()
    except SplitflError as error:
        sys.exit(str(error))
