"""Look at a queue of proposals and decide: `python -m examples.code_migration.review QUEUE list|accept|reject ...`.

Only proposals that passed the hook can be accepted. `export` writes the accepted ones as rows to tune on.
"""

from __future__ import annotations

import argparse
import difflib
import getpass
import sys
from pathlib import Path

from examples.code_migration.review_queue import Proposal, Queue, acceptance
from examples.code_migration.rules import instruction, rule_named
from examples.rows import write
from splitfl.errors import SplitflError, printable


def shown(one: Proposal) -> str:
    """A proposal for a person: what goes, what comes."""
    head = f"{one.id}  {one.rule}  hook {one.verdict}  {one.status}"
    if one.status != "pending":
        head += f" by {printable(one.reviewer, 60)} {one.decided}"
    changes = difflib.ndiff([printable(one.before, 400)], [printable(one.proposed, 400)])
    return "\n".join([head, *(f"    {line.rstrip()}" for line in changes if line[0] in "+-")])


def export(queue: Queue) -> list[dict[str, str]]:
    """Accepted proposals as rows with prompt and completion: what a next training may learn from."""
    return [
        {"prompt": instruction(rule_named(one.rule), one.before), "completion": one.proposed}
        for one in queue.proposals
        if one.status == "accepted"
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.code_migration.review")
    parser.add_argument("queue", type=Path)
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="show proposals")
    listing.add_argument("--status", choices=("pending", "accepted", "rejected"))
    for name in ("accept", "reject"):
        deciding = actions.add_parser(name)
        deciding.add_argument("ids", nargs="+")
        deciding.add_argument("--reviewer", default=getpass.getuser())
        deciding.add_argument("--reason", default="")
    actions.add_parser("export", help="write accepted proposals as rows").add_argument("out", type=Path)
    given = parser.parse_args()
    queue = Queue(given.queue)
    if given.action == "list":
        for one in queue.proposals:
            if given.status in (None, one.status):
                print(shown(one))
        print("  ".join(f"{metric} {value:.2f}" for metric, value in acceptance(queue.proposals).items()))
    elif given.action == "export":
        rows = export(queue)
        write(given.out, rows)
        print(f"{len(rows)} rows")
    else:
        status = "accepted" if given.action == "accept" else "rejected"
        for one in queue.decide(given.ids, status, reviewer=given.reviewer, reason=given.reason):
            print(shown(one))
        queue.write()


if __name__ == "__main__":
    try:
        main()
    except SplitflError as error:
        sys.exit(str(error))
