"""HateCheck (Roettger et al., ACL 2021) for tuned servers: which kinds of post does a classifier get right?

See `python -m examples.moderation.hatecheck --help`. As in the paper, class hate of the data counts as hateful, and
both others as not. A server's own thresholds are used where its run has them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.rows import Record, drawn, named, need, read
from examples.whole import Whole
from splitfl.metrics import Result, write_results

DATASET, HATE, HATEFUL = "hatecheck", 0, "hateful"


def by_functionality(cases: Sequence[Record], hateful: Sequence[bool]) -> dict[str, float]:
    """Share of right answers in each functional test, 0 to 1."""
    found: dict[str, list[bool]] = defaultdict(list)
    for case, guess in zip(cases, hateful, strict=True):
        found[case["functionality"]].append(guess == (case["label"] == HATEFUL))
    return {name: sum(right) / len(right) for name, right in sorted(found.items())}


def chosen(cases: list[Record], each: int) -> list[Record]:
    """At most `each` cases of a functional test."""
    found: dict[str, list[Record]] = defaultdict(list)
    for case in cases:
        found[case["functionality"]].append(case)
    return [case for own in found.values() for case in drawn(own, each)]


def macro_f1(cases: Sequence[Record], hateful: Sequence[bool]) -> float:
    """Mean F1 of hateful and not hateful."""
    truth = [case["label"] == HATEFUL for case in cases]
    scores = []
    for side in (True, False):
        hit = sum(t == g == side for t, g in zip(truth, hateful, strict=True))
        either = sum(t == side for t in truth) + sum(g == side for g in hateful)
        scores.append(2 * hit / either if either else 0.0)
    return sum(scores) / 2


def offsets_of(run: Path, classes: int) -> list[float]:
    """What a server adds to its logits, by ``thresholds.json`` of the run; nothing where there is none."""
    file, found = run / "thresholds.json", [0.0] * classes
    if file.is_file():  # it names classes as the rows do, which is by number; their order in the file means nothing
        for name, offset in json.loads(file.read_text(encoding="utf-8"))["logit_offsets"].items():
            found[int(name)] = offset
    return found


def table(found: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> Table:
    """One line a functional test, one column a server."""
    shown = Table("functional test", "cases", *found)
    for name in next(iter(found.values())):
        shown.add_row(name, str(counts.get(name, "")), *(f"{own[name]:.2f}" for own in found.values()))
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m examples.moderation.hatecheck")
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--run", action="append", required=True, metavar="SERVER=RUN")
    parser.add_argument("--each", type=int, default=20, help="cases of a functional test at most")
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    need(given.data, DATASET)
    cases, whole = chosen(read(given.data / DATASET, "test"), given.each), Whole(given.model, given.kit)
    texts, found = [case["text"].strip() for case in cases], {}
    for server, run in named(given.run).items():
        offsets = offsets_of(run, len(whole.kit.config.id2label))
        with whole.tuned(run / "adapter") as model:
            guesses = whole.classes(model, texts, max_length=given.max_length, offsets=offsets)
        hateful = [guess == HATE for guess in guesses]
        found[server] = {**by_functionality(cases, hateful), "all: macro F1": macro_f1(cases, hateful)}
    counts: dict[str, int] = defaultdict(int)
    for case in cases:
        counts[case["functionality"]] += 1
    Console(width=100).print(table(found, counts))
    if given.json is not None:
        results = [
            Result(case=f"{server}/{test}", metric="score" if "F1" in test else "right", value=value, unit="share")
            for server, own in found.items()
            for test, value in own.items()
        ]
        write_results(given.json, "examples.moderation.hatecheck", vars(given), results)


if __name__ == "__main__":
    main()
