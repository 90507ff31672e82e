"""Make the parties' files of the recipe: `python -m examples.natural_partitions.prepare DATA OUT --of dolly|speakers`.

DATA is a folder that holds ``dolly_federated`` (fields client, instruction, context, response) and ``tinyshakespeare``
(``train.txt``: blocks of ``SPEAKER:``, lines, blank line). Writes OUT/PARTY.train.jsonl, PARTY.held.jsonl and
PARTY.test.jsonl. Prints the parties, biggest first.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

from examples.rows import Record, drawn, need, read, write

_BLOCK = re.compile(r"\n\s*\n")
_SHORT = 600
"""Characters of a row at most; the small model has 512 positions."""


def speakers(text: str, *, words: int = 60) -> dict[str, list[Record]]:
    """Speaker -> speeches in their order, joined to rows of `words` words or a few more.

    A block without a colon at the end of its first line belongs to nobody and is left out.
    """
    said: dict[str, list[str]] = defaultdict(list)
    for block in _BLOCK.split(text):
        name, newline, speech = block.strip().partition(":\n")
        if newline and speech.strip() and "\n" not in name:
            said[name.strip()].append(speech.strip())
    found: dict[str, list[Record]] = {}
    for name, speeches in said.items():
        rows, row = list[Record](), ""
        for speech in speeches:
            row = f"{row}\n{speech}".strip()
            if len(row.split()) >= words:
                rows.append({"text": row[:_SHORT]})
                row = ""
        if row:
            rows.append({"text": row[:_SHORT]})
        found[name] = rows
    return found


def dolly(rows: list[Record]) -> dict[str, list[Record]]:
    """Client -> its rows as instruction, input and output; rows that name no client are left out."""
    found: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        short = len(row["instruction"]) + len(row["context"]) + len(row["response"]) <= _SHORT
        if row["client"] is not None and short and row["response"].strip():
            found[f"client{row['client']}"].append(
                {"instruction": row["instruction"], "input": row["context"], "output": row["response"],
                 "category": row["category"]}
            )  # fmt: skip
    return found


def split(rows: list[Record], counts: dict[str, int]) -> dict[str, list[Record]]:
    """Parts of one party's rows, no row in two: what is held back and tested on is taken before the training rows."""
    mixed, found, at = drawn(rows, len(rows)), dict[str, list[Record]](), 0
    for part in ("test", "held", "train"):
        found[part] = mixed[at : at + counts[part]]
        at += counts[part]
    return found


def party_name(name: str) -> str:
    """A name that can be that of a file and a key."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def prepare(data: Path, out: Path, of: str, parties: int, counts: dict[str, int]) -> list[str]:
    """Write the files of the parties with most rows; their names."""
    if of == "dolly":
        need(data, "dolly_federated")
        found = dolly(read(data / "dolly_federated", "train"))
    else:
        need(data, "tinyshakespeare")
        found = speakers((data / "tinyshakespeare" / "train.txt").read_text(encoding="utf-8"))
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:parties]
    for name in names:
        for part, rows in split(found[name], counts).items():
            write(out / f"{party_name(name)}.{part}.jsonl", rows)
    return [party_name(name) for name in names]


def categories(folder: Path, party: str) -> Counter[str]:
    """How many training rows of each kind a client has."""
    return Counter(row.get("category", "-") for row in read(folder, f"{party}.train"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--of", choices=("dolly", "speakers"), required=True)
    parser.add_argument("--parties", type=int, default=4)
    parser.add_argument("--train", type=int, default=48, help="rows of a party at most")
    parser.add_argument("--held", type=int, default=6)
    parser.add_argument("--test", type=int, default=16)
    given = parser.parse_args()
    counts = {"train": given.train, "held": given.held, "test": given.test}
    print(*prepare(given.data, given.out, given.of, given.parties, counts))


if __name__ == "__main__":
    main()
