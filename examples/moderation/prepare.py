"""Make the servers' files of the recipe: `python -m examples.moderation.prepare DATA OUT`.

DATA is a folder that holds ``hate_offensive_davidson`` (fields ``text``, ``label``: 0 hate, 1 offensive, 2 neither).
Writes OUT/SERVER.train.jsonl and OUT/SERVER.held.jsonl. The texts are offensive.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from examples.rows import Record, drawn, need, read, write

DATASET = "hate_offensive_davidson"
SHARES = {
    "north": (0.45, 0.35, 0.20),
    "south": (0.35, 0.45, 0.20),
    "east": (0.10, 0.20, 0.70),
    "west": (0.05, 0.80, 0.15),
}
"""Share of hate, offensive and neither among the posts of each server; in the data it is 0.06, 0.78 and 0.17."""


def deal(rows: list[Record], count: int, salt: str) -> dict[str, list[Record]]:
    """`count` rows for each server with its shares of labels; no row goes to two."""
    left = {label: drawn((r for r in rows if r["label"] == label), len(rows), salt) for label in (0, 1, 2)}
    found: dict[str, list[Record]] = {}
    for server, shares in SHARES.items():
        own: list[Record] = []
        for label in (2, 0, 1):  # the commonest label fills up what rounding and a class that ran out leave open
            wanted = count - len(own) if label == 1 else round(count * shares[label])
            own += [left[label].pop() for _ in range(min(wanted, len(left[label])))]
        found[server] = drawn(({"text": r["text"], "label": r["label"]} for r in own), count, salt)
    return found


def prepare(data: Path, out: Path, train: int, held: int) -> None:
    """Write the files."""
    dealt = {
        "train": deal(read(data / DATASET, "train"), train, "train"),
        "held": deal(read(data / DATASET, "validation") + read(data / DATASET, "test"), held, "held"),
    }
    for part, servers in dealt.items():
        for server, rows in servers.items():
            write(out / f"{server}.{part}.jsonl", rows)
            labels = Counter(row["label"] for row in rows)
            told = f"hate {labels[0]}, offensive {labels[1]}, neither {labels[2]}"
            print(f"{server}: {len(rows)} rows to {part} ({told})", file=sys.stderr)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=300, help="rows of a server")
    parser.add_argument("--held", type=int, default=100)
    given = parser.parse_args()
    need(given.data, DATASET)
    prepare(given.data, given.out, given.train, given.held)


if __name__ == "__main__":
    main()
