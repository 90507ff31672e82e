"""Make the parties' files: `python -m examples.medical_financial.prepare DATA OUT --of medquad|pubmedqa|financial`.

DATA is a folder that holds ``medquad`` (question, answer, source), ``pubmedqa`` (question, context, label) and
``twitter_financial_news`` (text, label: 0 bearish, 1 bullish, 2 neutral). Writes PARTY.train.jsonl, PARTY.held.jsonl
and PARTY.test.jsonl, and prints the parties.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from examples.rows import Record, drawn, need, read, write

DATASETS = {"medquad": "medquad", "pubmedqa": "pubmedqa", "financial": "twitter_financial_news"}
SPLITS = {"train": "train", "validation": "held", "test": "test"}
SOURCES = {"genetics": ("GHR",), "rare": ("GARD",), "institutes": ("NINDS", "NIDDK", "NHLBI", "CancerGov")}
"""Publishers of MedQuAD that are one party: the two big ones, and four institutes of the NIH together."""
ANSWERS = {"no": 0, "yes": 1, "maybe": 2}
_CASHTAG = re.compile(r"\$[A-Z]{1,5}\b")
_REPORTED = re.compile(r"https?://\S+")


def medquad(row: Record) -> tuple[str | None, Record]:
    """Party and row: a question and its answer, by publisher."""
    party = next((name for name, sources in SOURCES.items() if row["source"] in sources), None)
    return party, {"prompt": f"{row['question'].strip()}\n", "completion": row["answer"].strip()[:400]}


def pubmedqa(row: Record) -> tuple[str | None, Record]:
    """Party and row: is the question of a study answered yes, no or maybe? Three clinics, by the study's number.

    The data says nothing that would make a natural split, so this one is by chance; the question comes first, and the
    abstract's end, where its results are, so that the small encoder's few tokens hold them.
    """
    clinic = ("first-clinic", "second-clinic", "third-clinic")[int(row["pmid"]) % 3]
    return clinic, {
        "text": f"{row['question'].strip()} {row['context'].strip()[-400:]}",
        "label": ANSWERS[row["label"]],
    }


def financial(row: Record) -> tuple[str | None, Record]:
    """Party and row: the tone of a tweet, by what it is about: no share, one, or several, told by its cashtags."""
    shares = len(set(_CASHTAG.findall(row["text"])))
    party = "economy" if shares == 0 else "one-share" if shares == 1 else "portfolio"
    return party, {"text": _REPORTED.sub("", row["text"]).strip(), "label": row["label"]}


MAKERS: dict[str, Callable[[Record], tuple[str | None, Record]]] = {
    "medquad": medquad, "pubmedqa": pubmedqa, "financial": financial,
}  # fmt: skip


def prepare(data: Path, out: Path, of: str, counts: dict[str, int]) -> dict[str, dict[str, Counter[int]]]:
    """Write the files; party -> part -> labels (all 0 where rows have none)."""
    need(data, DATASETS[of])
    found: dict[str, dict[str, Counter[int]]] = defaultdict(dict)
    for name, part in SPLITS.items():
        by_party: dict[str, list[Record]] = defaultdict(list)
        for row in read(data / DATASETS[of], name):
            party, made = MAKERS[of](row)
            if party is not None:
                by_party[party].append(made)
        for party in sorted(by_party):
            rows = drawn(by_party[party], counts[part])
            write(out / f"{party}.{part}.jsonl", rows)
            found[party][part] = Counter(row.get("label", 0) for row in rows)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--of", choices=tuple(MAKERS), required=True)
    parser.add_argument("--train", type=int, default=120, help="rows of a party at most")
    parser.add_argument("--held", type=int, default=8)
    parser.add_argument("--test", type=int, default=32)
    given = parser.parse_args()
    counts = {"train": given.train, "held": given.held, "test": given.test}
    print(*prepare(given.data, given.out, given.of, counts))


if __name__ == "__main__":
    main()
