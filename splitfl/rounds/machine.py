"""Who may say what when in a round, and what follows from it. Pure: one standing and one event give the next standing.

    gathering -> training -> advertise -> share -> submit -> agree -> reveal -> summing -> settling -> storing
                             (stages that this way of summing leaves out are skipped)

With `Course.proposed` one party hands the next state over before the others report: summing -> proposing -> settling.

An *attempt* ends early when too few are left; the round then begins again under a higher number, with the same updates.
A *round* ends kept or dropped, and is kept only if more than half of those whose updates are in the sum have computed
the same next state from it. `ALLOWED` is the whole table; `step` refuses everything else and never half applies.
"""

from __future__ import annotations

from typing import cast

from msgspec.structs import replace

from splitfl.aggregation.sums import STAGES
from splitfl.errors import InternalError
from splitfl.rounds.ending import drop, keep, too_few
from splitfl.rounds.events import (
    Begins,
    Enters,
    Event,
    Fails,
    Hands,
    IsReady,
    Late,
    Leaves,
    Reports,
    Stored,
    Summed,
)
from splitfl.rounds.records import Course, Member, Phase, Present, Standing
from splitfl.wire.round_frames import RoundViolation
from splitfl.wire.round_messages import TaskName

_STAGES: frozenset[Phase] = frozenset(cast("tuple[Phase, ...]", STAGES))
_ATTEMPT: frozenset[Phase] = frozenset({"training", "summing", *_STAGES})
_ANY: frozenset[Phase] = frozenset({"gathering", "proposing", "settling", "storing", "finished", *_ATTEMPT})
ALLOWED: dict[type[Event], frozenset[Phase]] = {
    Enters: _ANY,
    Begins: frozenset({"gathering"}),
    IsReady: frozenset({"training"}),
    Hands: _STAGES,
    Summed: frozenset({"summing"}),
    Fails: _ATTEMPT,
    Reports: frozenset({"settling"}),
    Stored: frozenset({"proposing", "storing"}),
    Leaves: _ANY,
    Late: _ATTEMPT | {"proposing", "settling", "storing"},
}
"""Event to the phases in which it may happen. A repeated `IsReady`, `Hands` or `Reports` is allowed later too."""


def step(course: Course, standing: Standing, event: Event) -> Standing:
    """The standing after `event`; the same object if nothing has changed.

    Raises:
        RoundViolation: a party said what it may not say now; ``late``, ``not_in_round``, ``conflict``.
        InternalError: the coordinator did what it may not do now.
    """
    if isinstance(event, IsReady | Hands | Reports):
        member = _member(standing, event)
        if _is_repeated(member, event):
            return standing
    if standing.phase not in ALLOWED[type(event)]:
        raise _out_of_order(standing, event)
    match event:
        case Enters():
            return _enter(course, standing, event)
        case Begins():
            return _begin(course, standing, event)
        case IsReady():
            return _advance(course, _with(standing, event.party, ready=True))
        case Hands():
            return _hand(course, standing, event)
        case Summed():
            summed = replace(standing, phase="settling", shown={**standing.shown, "result": event.digest})
            return _ask_next(course, replace(summed, phase="proposing", asked=())) if course.proposed else summed
        case Fails():
            return _fail(course, standing, event.reason)
        case Reports():
            return _advance(course, _with(standing, event.party, scores=event.scores))
        case Stored():
            return _store(course, standing, event)
        case Leaves():
            return _leave(course, standing, event)
        case Late():
            return _late(course, standing)


def task_for(course: Course, standing: Standing, party: str, session: int) -> TaskName:
    """What `party` is to do now; ``wait`` where there is nothing."""
    member = standing.members.get(party)
    if member is None or member.out or member.session != session:
        return "wait"
    if standing.phase == "training":
        return "wait" if member.ready else "train"
    if standing.phase in _STAGES:
        return "wait" if standing.phase in member.items else cast("TaskName", standing.phase)
    if standing.phase == "settling":
        return "wait" if member.scores is not None else "settle"
    if standing.asked[-1:] != (party,):
        return "wait"
    return "propose" if standing.phase == "proposing" else "store" if standing.phase == "storing" else "wait"


def missing(standing: Standing) -> list[str]:
    """The parties that the phase waits for, sorted."""
    if standing.phase in ("proposing", "storing"):
        return list(standing.asked[-1:])
    return [party for party in standing.inside() if not _has_done(standing.phase, standing.members[party])]


# ---- parties come and go


def _enter(course: Course, standing: Standing, event: Enters) -> Standing:
    known = standing.present.get(event.party)
    present = Present(session=event.session, rows=event.rows)
    entered = standing if known == present else _with_present(standing, event.party, present)
    member = standing.members.get(event.party)
    if member is None or member.out or member.session == event.session:
        return entered
    if course.stages == ("submit",) or standing.phase == "training":  # nothing is lost with its process
        return _with(entered, event.party, session=event.session)
    return _advance(course, _with(entered, event.party, out="it came back without its secrets"))


def _leave(course: Course, standing: Standing, event: Leaves) -> Standing:
    present = standing.present.get(event.party)
    if present is None or present.session != event.session:
        return standing
    if not event.only_attempt:
        others = {party: there for party, there in standing.present.items() if party != event.party}
        standing = replace(standing, present=others)
    member = standing.members.get(event.party)
    if member is None or member.out or member.session != event.session:
        return standing
    return _advance(course, _with(standing, event.party, out=event.why or "it left"))


def _begin(course: Course, standing: Standing, event: Begins) -> Standing:
    chosen = sorted(set(event.parties))
    if len(chosen) < course.min_parties or any(party not in standing.present for party in chosen):
        raise InternalError("A round was begun with parties that are too few or not there.")
    members = {party: Member(session=standing.present[party].session) for party in chosen}
    present = {
        party: replace(there, expected=True) if party in members else there for party, there in standing.present.items()
    }
    begun = replace(standing, phase="training", present=present, members=members)
    return replace(begun, parties=(), shown={}, agreed=None, asked=())


# ---- stages


def _hand(course: Course, standing: Standing, event: Hands) -> Standing:
    if event.stage != standing.phase:
        raise _late_refusal(standing)
    items = {**standing.members[event.party].items, event.stage: event.digest}
    return _advance(course, _with(standing, event.party, items=items))


def _late(course: Course, standing: Standing) -> Standing:
    """The deadline: whoever has not done its part is out."""
    if standing.phase in ("proposing", "storing"):
        return _ask_next(course, standing)
    if standing.phase == "summing":
        return standing
    for party in missing(standing):
        standing = _with(standing, party, out=f"it missed the deadline of {standing.phase}")
        if party in standing.present:
            standing = _with_present(standing, party, replace(standing.present[party], expected=False))
    return _advance(course, standing)


def _advance(course: Course, standing: Standing) -> Standing:
    """On to the next phase if nobody is missing; the end of the attempt if too few are left."""
    phase = standing.phase
    if phase == "training" or phase in _STAGES:
        left = len(standing.survivors()) if phase == "submit" else 0
        if max(left, len(standing.inside())) < course.min_parties:
            return _fail(course, standing, too_few(standing, course))
    if phase in ("gathering", "summing", "proposing", "storing", "finished") or missing(standing):
        return _advance_asking(course, standing)
    if phase == "training":
        first = cast("Phase", course.stages[0])
        return replace(standing, phase=first, parties=tuple(standing.inside()))
    if phase == "settling":
        return _settle(course, standing)
    if phase == "submit" and len(standing.survivors()) < course.min_parties:
        return _fail(course, standing, too_few(standing, course))
    later = course.stages[course.stages.index(phase) + 1 :]
    return replace(standing, phase=cast("Phase", later[0]) if later else "summing")


def _advance_asking(course: Course, standing: Standing) -> Standing:
    """While a state is asked from one party: ask another one if this one has gone."""
    if standing.phase in ("proposing", "storing") and standing.members[standing.asked[-1]].out:
        return _ask_next(course, standing)
    return standing


def _fail(course: Course, standing: Standing, reason: str) -> Standing:
    """The attempt ends; the round begins again, or is dropped if it has been begun too often."""
    tried = replace(standing, failures=(*standing.failures, reason))
    if standing.attempt + 1 >= course.attempts:
        return drop(course, tried, f"{course.attempts} attempts failed; the last one because {reason}")
    return replace(
        tried, phase="gathering", attempt=standing.attempt + 1, members={}, parties=(), shown={}, agreed=None, asked=()
    )


# ---- the end of a round


def _settle(course: Course, standing: Standing) -> Standing:
    """Everybody has reported who will: is there one state that most of them have?"""
    survivors = standing.survivors()
    votes: dict[str, int] = {}
    for party in survivors:
        scores = standing.members[party].scores
        if scores is not None:
            votes[scores.state] = votes.get(scores.state, 0) + 1
    agreed = next((state for state, count in votes.items() if 2 * count > len(survivors)), None)
    if agreed is None:
        counted = ", ".join(str(count) for count in sorted(votes.values(), reverse=True)) or "nobody"
        return drop(
            course,
            standing,
            f"of {len(survivors)} parties no more than half computed the same state (agreeing: {counted})",
        )
    settled = replace(standing, phase="storing", agreed=agreed, asked=())
    held = (standing.state, standing.shown.get("result"), standing.shown.get("proposal"))
    if agreed in (*held, standing.best and standing.best.state):
        return keep(course, settled)  # it is here already
    return _ask_next(course, settled)


def _ask_next(course: Course, standing: Standing) -> Standing:
    """Ask the next party that has the agreed state (or any, while none is agreed) to hand it over."""
    survivors = standing.survivors()
    turn = standing.round % max(1, len(survivors))  # by turns, so that no party can spoil every round with its proposal
    for party in (*survivors[turn:], *survivors[:turn]):
        member = standing.members[party]
        has_it = standing.phase == "proposing" or (member.scores is not None and member.scores.state == standing.agreed)
        if has_it and not member.out and party not in standing.asked:
            return replace(standing, asked=(*standing.asked, party))
    return drop(course, standing, "nobody handed over the next state")


def _store(course: Course, standing: Standing, event: Stored) -> Standing:
    if standing.phase == "proposing":
        return replace(standing, phase="settling", shown={**standing.shown, "proposal": event.digest})
    if event.digest != standing.agreed:
        raise InternalError("Another state than the agreed one was stored.")
    return keep(course, standing)


# ---- small things


def _member(standing: Standing, event: IsReady | Hands | Reports) -> Member:
    """The sender as a member of the attempt that it speaks of."""
    if (event.round, event.attempt) != (standing.round, standing.attempt):
        raise _late_refusal(standing)
    member = standing.members.get(event.party)
    if member is None or member.session != event.session or member.out:
        why = f": {member.out}" if member is not None and member.out else ""
        raise RoundViolation(
            f"This party is not in attempt {standing.attempt} of round {standing.round}{why}.",
            code="not_in_round",
            hint="wait for the next one",
        )
    return member


def _is_repeated(member: Member, event: IsReady | Hands | Reports) -> bool:
    """Whether this very thing was acknowledged before.

    Raises:
        RoundViolation: something else was.
    """
    if isinstance(event, IsReady):
        return member.ready
    said: object = event.scores if isinstance(event, Reports) else event.digest
    before: object = member.scores if isinstance(event, Reports) else member.items.get(event.stage)
    if before is not None and before != said:
        raise RoundViolation(
            "Something else was acknowledged for this before.", code="conflict", expected="the same bytes in a retry"
        )
    return before is not None


def _has_done(phase: Phase, member: Member) -> bool:
    if phase == "training":
        return member.ready
    if phase == "settling":
        return member.scores is not None
    return phase not in _STAGES or phase in member.items


def _with(standing: Standing, party: str, **changes: object) -> Standing:
    member = replace(standing.members[party], **changes)
    return replace(standing, members={**standing.members, party: member})


def _with_present(standing: Standing, party: str, present: Present) -> Standing:
    return replace(standing, present={**standing.present, party: present})


def _out_of_order(standing: Standing, event: Event) -> RoundViolation | InternalError:
    if isinstance(event, IsReady | Hands | Reports):
        return _late_refusal(standing)
    return InternalError(f"{type(event).__name__} cannot happen while the federation is {standing.phase}.")


def _late_refusal(standing: Standing) -> RoundViolation:
    return RoundViolation(
        "This belongs to another round, attempt or stage than the one under way.",
        code="late",
        expected=f"round {standing.round}, attempt {standing.attempt}, {standing.phase}",
        hint="ask what there is to be done",
    )
