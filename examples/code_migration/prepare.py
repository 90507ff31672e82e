"""Make the parties' files of the recipe: `python -m examples.code_migration.prepare DATA OUT`.

DATA is a folder that holds ``code_trans_java_cs``, of which the Java side is used. Each party has the edits that the
migrations of rules.py make in its own projects' methods. Writes OUT/PARTY.train.jsonl, PARTY.held.jsonl and
PARTY.test.jsonl; test rows also carry the method and the place of the edit.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

from examples.code_migration.rules import edits, instruction
from examples.code_translation.projects import PARTIES, party_of
from examples.rows import Record, drawn, need, read, write

DATASET, LONGEST = "code_trans_java_cs", 160
"""A piece of code that is to change has at most so many characters."""
SPLITS = {"train": "train", "validation": "held", "test": "test"}


def rows_of(methods: list[Record]) -> dict[str, list[Record]]:
    """The edits of each party, as rows."""
    found: dict[str, list[Record]] = defaultdict(list)
    for row in methods:
        party = party_of(row)
        if party is None:
            continue
        for edit in edits(row["java"].strip()):
            if len(edit.before) <= LONGEST:
                found[party].append({
                    "prompt": instruction(edit.rule, edit.before), "completion": edit.after, "rule": edit.rule.name,
                    "method": edit.method, "start": edit.start, "end": edit.end,
                })  # fmt: skip
    return found


def spread(rows: list[Record], count: int) -> list[Record]:
    """At most `count` rows, the rare migrations first: each may have its share before one takes what is left."""
    by_rule: dict[str, list[Record]] = defaultdict(list)
    for row in drawn(rows, len(rows)):
        by_rule[row["rule"]].append(row)
    found: list[Record] = []
    for place in range(max(map(len, by_rule.values()), default=0)):
        found += [own[place] for own in by_rule.values() if place < len(own)]
    return found[:count]


def prepare(data: Path, out: Path, counts: dict[str, int]) -> None:
    """Write the files. The few old idioms of the validation and test rows are not enough, so these are drawn from all
    methods: a method's hash says which part it belongs to, and no method is in two of them."""
    methods = {row["java"].strip(): row for split in SPLITS for row in read(data / DATASET, split)}
    parts: dict[str, list[Record]] = {"train": [], "held": [], "test": []}
    for number, row in enumerate(drawn(methods.values(), len(methods))):
        parts["test" if number % 5 == 0 else "held" if number % 5 == 1 else "train"].append(row)
    for part, chosen in parts.items():
        found = rows_of(chosen)
        for party in PARTIES:
            own = spread(found[party], counts[part])
            write(out / f"{party}.{part}.jsonl", own)
            told = ", ".join(f"{rule} {n}" for rule, n in Counter(row["rule"] for row in own).most_common())
            print(f"{party}: {len(own)} edits to {part} ({told})", file=sys.stderr)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=120, help="rows of a party at most")
    parser.add_argument("--held", type=int, default=12)
    parser.add_argument("--test", type=int, default=16)
    given = parser.parse_args()
    need(given.data, DATASET)
    prepare(given.data, given.out, {"train": given.train, "held": given.held, "test": given.test})


if __name__ == "__main__":
    main()
