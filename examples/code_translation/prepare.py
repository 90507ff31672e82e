"""Make the parties' files of the recipe: `python -m examples.code_translation.prepare DATA OUT`.

DATA is a folder that holds ``code_trans_java_cs`` (``train.jsonl``, ``validation.jsonl``, ``test.jsonl``; fields
``java`` and ``cs``). Writes OUT/PARTY.train.jsonl, PARTY.held.jsonl (the validation rows by which rounds are judged)
and PARTY.test.jsonl, and the same under the name of ``everybody`` for the pooled arm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.code_translation.projects import PARTIES, party_of, placed
from examples.rows import Record, drawn, need, read, write

DATASET, LONGEST = "code_trans_java_cs", 240
"""A pair of methods has at most so many characters, so that prompt and answer fit the small model."""
SPLITS = {"train": "train", "validation": "held", "test": "test"}


def task(row: Record) -> Record:
    """A pair of methods as prompt and completion."""
    return {"prompt": f"Java:\n{row['java'].strip()}\nC#:\n", "completion": row["cs"].strip()}


def prepare(data: Path, out: Path, counts: dict[str, int]) -> None:
    """Write the files; `counts` says how many rows a party gets of each split at most."""
    seen: set[str] = set()  # a method of a later split that an earlier one has too is left out
    for split, short in SPLITS.items():
        rows = read(data / DATASET, split)
        if split == "train":
            print("rows by project:", dict(placed(rows).most_common()), file=sys.stderr)
        fitting = [row for row in rows if len(row["java"]) + len(row["cs"]) <= LONGEST and row["java"] not in seen]
        seen.update(row["java"] for row in fitting)
        shared: list[Record] = []
        for party in PARTIES:
            own = [task(row) for row in drawn((r for r in fitting if party_of(r) == party), counts[short])]
            write(out / f"{party}.{short}.jsonl", own)
            shared += own
            print(f"{party}: {len(own)} rows of {split}", file=sys.stderr)
        write(out / f"everybody.{short}.jsonl", shared)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=160, help="rows of a party at most")
    parser.add_argument("--held", type=int, default=8)
    parser.add_argument("--test", type=int, default=12)
    given = parser.parse_args()
    need(given.data, DATASET)
    prepare(given.data, given.out, {"train": given.train, "held": given.held, "test": given.test})


if __name__ == "__main__":
    main()
