"""Make the small data sets of splitfl/assets/data from MedQuAD and the sentence polarity data.

    python examples/pretrain/make_demo_data.py --data ../shared/data --out splitfl/assets/data

Two parties whose rows really differ: the hospital has the answers on genetic diseases (Genetics Home Reference), the
clinic those on everyday health (MedlinePlus topics, NIDDK, NIH Senior Health). The held-out rows are about diseases
that no training row is about, since MedQuAD comes split by disease. The same input always gives the same files.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from corpus import find_split, read_rows

PARTIES = {"hospital": {"GHR"}, "clinic": {"MPlusHealthTopics", "NIDDK", "NIHSeniorHealth"}}
TRAIN_ROWS, HELD_ROWS = 300, 40
LONGEST, SHORTEST = 400, 40  # characters of an answer
SENTIMENT_ROWS = {"train": 400, "test": 100}


def rows_of(data: Path, source: str, splits: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of the given splits, one after the other.

    Raises:
        SystemExit: the data directory lacks one.
    """
    for split in splits:
        path = find_split(data, source, split)
        if path is None:
            raise SystemExit(f"no {split} file in {data / source}; is --data the right folder?")
        yield from read_rows(path)


def cut_at_sentence(text: str, longest: int = LONGEST) -> str:
    """As many whole sentences from the start as fit; empty where not even the first fits."""
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    # Two lower-case letters, a digit or a bracket before the stop: "U.S. Army" and "e.g. Crohn" end no sentence.
    ends = [match.end() for match in re.finditer(r"(?:[a-z]{2}|[\d)%])[.?!](?= [A-Z])", text)]
    return text[: max((end for end in ends if end <= longest), default=0)]


def question_rows(rows: Iterable[dict[str, Any]], sources: set[str], count: int) -> list[dict[str, str]]:
    """The first `count` usable rows of the sources as prompt and completion, no question twice.

    Raises:
        SystemExit: there are fewer.
    """
    chosen: dict[str, str] = {}
    for row in rows:
        prompt = " ".join(row["question"].split()).rstrip(" ?") + "?"
        answer = cut_at_sentence(row["answer"].removeprefix("Summary :"))
        whole = len(answer) >= SHORTEST and answer[-1] in ".?!"  # a list cut off, or a list alone, is no good answer
        if row["source"] in sources and whole:
            chosen.setdefault(prompt, answer)
    if len(chosen) < count:
        raise SystemExit(f"only {len(chosen)} usable rows from {sorted(sources)}, expected {count}")
    return [{"prompt": prompt, "completion": answer} for prompt, answer in list(chosen.items())[:count]]


def sentiment_rows(rows: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first rows in file order, as many of each label."""
    left = {0: count // 2, 1: count // 2}
    chosen = []
    for row in rows:
        if left[row["label"]] > 0:
            left[row["label"]] -= 1
            chosen.append({"text": " ".join(row["text"].split()), "label": row["label"]})
    return chosen


def write_text(path: Path, text: str) -> None:
    """Write the file whole."""
    written = path.with_name(path.name + ".part")
    written.write_text(text, encoding="utf-8", newline="\n")
    os.replace(written, path)
    print(f"{path}: {len(text.encode()):,} bytes")


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV with a head line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_jsonl(rows: list[dict[str, str]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder a source")
    parser.add_argument("--out", type=Path, default=Path("splitfl/assets/data"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for party, sources in PARTIES.items():
        train = question_rows(rows_of(options.data, "medquad", ["train"]), sources, TRAIN_ROWS)
        held = question_rows(rows_of(options.data, "medquad", ["validation", "test"]), sources, HELD_ROWS)
        write_text(options.out / f"{party}.train.jsonl", as_jsonl(train))
        write_text(options.out / f"{party}.held.jsonl", as_jsonl(held))
    for split, count in SENTIMENT_ROWS.items():
        rows = sentiment_rows(rows_of(options.data, "sentence_polarity", [split]), count)
        write_text(options.out / f"sentiment.{split}.csv", as_csv(rows))


if __name__ == "__main__":
    main()
