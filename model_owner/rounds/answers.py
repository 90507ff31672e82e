"""What the coordinator tells a party about the federation, out of the standing."""

from __future__ import annotations

from collections.abc import Mapping

from model_owner.rounds.engine import Engine
from splitfl.errors import printable
from splitfl.rounds import machine
from splitfl.rounds.sizes import update_bytes
from splitfl.wire import round_frames as wire
from splitfl.wire.round_frames import RoundViolation
from splitfl.wire.round_messages import ROUNDS_VERSION, Ask, Enter, Entered, Facts, Finished, Task

_UNDER_WAY_BYTES, _SMALLEST_PIECE = 8 << 20, 16 << 10
_REASON = 500  # characters of why a round was dropped


def entered(engine: Engine, message: Enter, admitted: int) -> Entered:
    """The terms, for a party that has entered.

    Pieces are the smaller the more parties are admitted: what all of them may have under way together (`WINDOW` pieces
    each) is bounded, and with it what waits in this process's memory.
    """
    share = _UNDER_WAY_BYTES // (wire.WINDOW * max(1, admitted))
    return Entered(
        session=message.session,
        request=message.request,
        version=ROUNDS_VERSION,
        federation=engine.standing.federation,
        rounds=engine.course.rounds,
        min_parties=engine.course.min_parties,
        clip=engine.clip,
        max_weight=engine.max_weight,
        piece_bytes=min(wire.PIECE_BYTES, max(_SMALLEST_PIECE, share)),
    )


def task(engine: Engine, party: str, question: Ask, seconds_left: float) -> Task:
    """What `party` is to do now."""
    standing, last = engine.standing, engine.standing.last
    return Task(
        session=question.session,
        request=question.request,
        task=machine.task_for(engine.course, standing, party, question.session),
        round=standing.round,
        attempt=standing.attempt,
        left_s=max(0.0, seconds_left),
        parties=standing.parties,
        state=standing.state or "",
        kept=last is None or last.kept,
        reason=last.reason[:_REASON] if last is not None else "",
        proposal="proposal" in standing.shown,
    )


def finished(engine: Engine, question: Ask) -> Finished:
    """That no round comes any more, and which one was the best."""
    standing, last = engine.standing, engine.standing.last
    return Finished(
        session=question.session,
        request=question.request,
        rounds=standing.round,
        reason=standing.reason[:_REASON],
        kept=last is None or last.kept,
        state=standing.state or "",
        best_round=standing.best.round if standing.best is not None else None,
        best_state=standing.best.state if standing.best is not None else "",
    )


def check_facts(engine: Engine, facts: Facts, pinned: Mapping[str, object], max_update: int) -> Facts:
    """The facts of a party that enters, if they are those of the federation.

    Args:
        engine: knows the facts of the first party that entered.
        facts: what this party states.
        pinned: what the operator has fixed, by name.
        max_update: bytes of one update.

    Raises:
        RoundViolation: code ``facts``, naming the first that differs.
    """
    for name in facts.__struct_fields__:
        came = getattr(facts, name)
        expected = pinned.get(name) if engine.facts is None else getattr(engine.facts, name)
        if expected is not None and came != expected:
            raise RoundViolation(
                f"This party's {name} is {printable(str(came), 80)}.",
                code="facts",
                expected=printable(str(expected), 80),
                hint="start every party with the same kit, rule, sum and adapter options",
            )
    largest = update_bytes(facts.sum, max(facts.lengths))
    if largest > max_update:
        raise RoundViolation(
            f"An update could have {largest} bytes.",
            code="facts",
            expected=f"at most {max_update}",
            hint="lower the rank, or raise --max-update at the coordinator",
        )
    return facts
