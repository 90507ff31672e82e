"""How a federation went, as a table for people and as figures for `--json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from model_owner.rounds.store import Cost
from splitfl.metrics import Result, peak_rss_bytes
from splitfl.report import as_size
from splitfl.rounds.records import Ended, Standing


def print_outcome(
    rounds: Sequence[tuple[Ended, Cost]], standing: Standing, name: Callable[[str], str], out: TextIO
) -> None:
    """One line a round, then the scores of each party in the best round."""
    if not rounds:
        return
    print(f"{'round':>5}  {'':8} {'parties':>7} {'shared':>8} {'own':>8} {'seconds':>8} {'bytes':>10}", file=out)
    for ended, cost in rounds:
        mark = "best" if standing.best is not None and standing.best.round == ended.round else ""
        verdict = "rollback" if ended.rolled_back else mark if ended.kept else "dropped"
        size = as_size(cost.bytes_in + cost.bytes_out)
        print(
            f"{ended.round:>5}  {verdict:8} {len(ended.summed):>7} {_score(ended.common)} {_score(ended.personal)} "
            f"{cost.seconds:>8.2f} {size:>10}",
            file=out,
        )
    best = next((e for e, _ in rounds if standing.best is not None and e.round == standing.best.round), None)
    if best is not None:
        print(f"scores on held-out rows in round {best.round}, the best by validation:", file=out)
        for party, scores in sorted(best.scores.items(), key=lambda pair: name(pair[0])):
            rows = f"{scores.rows} rows"
            print(f"  {name(party):24} shared {_score(scores.common)}  own {_score(scores.personal)}  {rows}", file=out)
    if standing.reason:
        print(standing.reason, file=out)


def results_of(rounds: Sequence[tuple[Ended, Cost]], standing: Standing) -> list[Result]:
    """The figures of every round, then of all of them."""
    results = []
    for ended, cost in rounds:
        case = f"round {ended.round}"
        verdict = ("rolled back" if ended.rolled_back else "kept") if ended.kept else f"dropped: {ended.reason}"
        results += [
            Result(case=case, metric="verdict", value=verdict, unit=""),
            Result(case=case, metric="updates summed", value=len(ended.summed), unit="parties"),
            Result(case=case, metric="attempts", value=ended.attempts, unit="attempts"),
            Result(case=case, metric="score of the shared model", value=ended.common, unit="score"),
            Result(case=case, metric="score of the parties' own models", value=ended.personal, unit="score"),
            Result(case=case, metric="time", value=cost.seconds, unit="seconds"),
            Result(case=case, metric="bytes received", value=cost.bytes_in, unit="bytes"),
            Result(case=case, metric="bytes sent", value=cost.bytes_out, unit="bytes"),
        ]
    best = standing.best
    return [
        *results,
        Result(case="federation", metric="best round", value=None if best is None else best.round, unit="round"),
        Result(case="federation", metric="best score", value=None if best is None else best.score, unit="score"),
        Result(case="federation", metric="rollbacks", value=standing.rollbacks, unit="rollbacks"),
        Result(case="federation", metric="peak memory", value=peak_rss_bytes(), unit="bytes"),
    ]


def _score(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>8}"
