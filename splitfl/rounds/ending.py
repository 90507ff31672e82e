"""How a round ends: kept or dropped, what its validation says, and whether the federation has collapsed.

A published run fell from 0.30 to 0.05 METEOR while its rounds went on, because nobody looked. So every kept round is
compared with the best one before it, by the mean validation score of the parties (weighted by their held-out rows,
never by test rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from splitfl.rounds.records import Best, Course, Ended, Scores, Standing


def mean_score(scores: Iterable[Scores], which: Callable[[Scores], float | None]) -> float | None:
    """Mean over those who have this score, weighted by their rows; a party that names no rows counts as one row."""
    pairs = [(value, max(each.rows, 1)) for each in scores if (value := which(each)) is not None]
    if not pairs:
        return None
    total = math.fsum(rows for _, rows in pairs)
    return math.fsum(value * (rows / total) for value, rows in pairs)


def keep(course: Course, standing: Standing) -> Standing:
    """The round stands: its state is the next one's start, unless the federation has collapsed."""
    ended = _ended(standing, kept=True, reason="", state=standing.agreed)
    score = ended.personal if course.judge == "personal" or ended.common is None else ended.common
    best, strikes = standing.best, standing.strikes
    if score is not None and standing.agreed is not None:
        if best is None or score > best.score:
            best, strikes = Best(round=standing.round, score=score, state=standing.agreed), 0
        elif best.score - score > course.collapse * abs(best.score):
            strikes += 1
        else:
            strikes = 0
    if best is None or strikes < course.patience:
        return _next(course, standing, ended, best=best, strikes=strikes, state=standing.agreed)
    why = f"{strikes} rounds in a row scored more than {course.collapse:.0%} below the best one, round {best.round}"
    ended = replace(ended, rolled_back=True, reason=f"rolled back: {why}", state=best.state)
    after = replace(standing, rollbacks=standing.rollbacks + 1)
    moved = _next(course, after, ended, best=best, strikes=0, state=best.state)
    if course.on_collapse == "stop":
        return replace(moved, phase="finished", reason=f"collapsed: {why}")
    return moved


def drop(course: Course, standing: Standing, reason: str) -> Standing:
    """The round does not stand: the next one starts where this one did."""
    ended = _ended(standing, kept=False, reason=reason, state=standing.state)
    return _next(course, standing, ended, best=standing.best, strikes=standing.strikes, state=standing.state)


def too_few(standing: Standing, course: Course) -> str:
    """Why an attempt cannot go on, without a name."""
    outs: dict[str, int] = {}
    for member in standing.members.values():
        if member.out:
            outs[member.out] = outs.get(member.out, 0) + 1
    why = "; ".join(f"{count} of {len(standing.members)}: {reason}" for reason, count in sorted(outs.items()))
    return f"fewer than {course.min_parties} parties are left in {standing.phase}" + (f" ({why})" if why else "")


def _ended(standing: Standing, *, kept: bool, reason: str, state: str | None) -> Ended:
    scores = {party: member.scores for party, member in standing.members.items() if member.scores is not None}
    counted = [each for each in scores.values() if not kept or each.state == standing.agreed]
    return Ended(
        round=standing.round,
        kept=kept,
        reason=reason,
        attempts=standing.attempt + 1,
        state=state,
        summed=standing.survivors(),
        scores=scores,
        personal=mean_score(counted, lambda each: each.personal),
        common=mean_score(counted, lambda each: each.common),
    )


def _next(
    course: Course, standing: Standing, ended: Ended, *, best: Best | None, strikes: int, state: str | None
) -> Standing:
    last = standing.round + 1 >= course.rounds
    return replace(
        standing,
        round=standing.round + 1,
        attempt=0,
        phase="finished" if last else "gathering",
        reason=f"all {course.rounds} rounds are done" if last else "",
        members={},
        parties=(),
        shown={},
        agreed=None,
        asked=(),
        failures=(),
        state=state,
        best=best,
        strikes=strikes,
        last=ended,
    )
