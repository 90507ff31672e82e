"""The controls of one audit: what they are run on, and which attack they are run with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from party.audit_jobs import Ground, view_of
from splitfl.audit.attack import Attack
from splitfl.audit.controls import LEAK, POSITIVE, Control, check_sensitivity, hush, inject
from splitfl.audit.course import Course
from splitfl.audit.results import Outcome, find_control, keep
from splitfl.audit.scoring import BLIND, main_of, score
from splitfl.audit.view import Guesses, Knowledge, Sent
from splitfl.config_audit import KNOWLEDGE
from splitfl.errors import UsageError

PROBED = 40
"""Rows, as sent, that the injected leak is tried on."""
CLEAR = 0.1
"""Difference between open and defended traffic from which a leak shows in the run's own traffic."""


def run_controls(
    ground: Ground, outcomes: list[Outcome], chosen: list[Attack], folder: Path, key: str, course: Course
) -> list[Control]:
    """Every control; that of the injected leak runs attacks of its own.

    Args:
        ground: of the audit.
        outcomes: of its attacks.
        chosen: its attacks.
        folder: of its files.
        key: of what they depend on.
        course: what people see.
    """
    controls = _positive(outcomes) + [each.negative for each in outcomes if each.negative is not None]
    course.begin("an injected leak")
    reader = _reader(outcomes, chosen)
    if reader is None:
        course.end("left out: no attack that reads tokens was run")
        return controls
    attack, knowledge = reader
    path = folder / "results" / "injected-leak.json"
    control = find_control(path, f"{key} {attack.name} {knowledge.short}")
    if control is None:
        control = _sensitivity(ground, attack, knowledge, course)
        keep(path, f"{key} {attack.name} {knowledge.short}", control)
    course.end(f"{attack.name} {knowledge.short}: the instrument {'works' if control.works else 'does not work'}")
    return [*controls, control]


def _open_ones(outcomes: list[Outcome]) -> list[Outcome]:
    """Attacks on tokens where nothing is defended: on the twin, or on the run itself where it has none."""
    reading = [each for each in outcomes if each.finds == "tokens" and each.main is not None]
    twins = [each for each in reading if each.traffic == "undefended"]
    return sorted(twins or reading, key=lambda each: -(each.main.value if each.main else 0.0))


def _positive(outcomes: list[Outcome]) -> list[Control]:
    """Reading what nobody defended: exhaustive decoding of a causal bottom has a bound of its own."""
    ranked = _open_ones(outcomes)
    exhaustive = [e for e in ranked if e.attack == "map_decode" and e.knowledge == Knowledge.EXACT.short]
    best = next(iter(exhaustive or ranked), None)
    if best is None or best.main is None:
        return []
    beyond = best.figures.get(BLIND)
    works = best.main.value >= POSITIVE if exhaustive else beyond is not None and beyond.low > 0
    bound = f"at least {POSITIVE} of the tokens" if exhaustive else "more than blind guessing gets"
    return [
        Control(
            name="positive", attack=best.attack, knowledge=best.knowledge, expected=f"undefended: {bound}",
            found=best.main, works=works,
        )
    ]  # fmt: skip


def _reader(outcomes: list[Outcome], chosen: list[Attack]) -> tuple[Attack, Knowledge] | None:
    """The cheapest of the attacks that read undefended traffic about as well as the best one."""
    ranked = _open_ones(outcomes)
    if not ranked or ranked[0].main is None:
        return None
    good = [each for each in ranked if each.main is not None and each.main.value >= 0.9 * ranked[0].main.value]
    cheapest = min(good, key=lambda each: each.cost.seconds / max(each.sends, 1))
    attack = next(each for each in chosen if each.name == cheapest.attack)
    return attack, Knowledge(KNOWLEDGE.index(cheapest.knowledge))


def _sensitivity(ground: Ground, attack: Attack, knowledge: Knowledge, course: Course) -> Control:
    part = ground.choice.moments[0] if knowledge == Knowledge.EXACT else (None, ground.choice.whole)
    numbers = [number for number in part[1] if number in ground.sent][:PROBED]
    real = [ground.sent[number] for number in numbers]
    open_ = [ground.twins.get(number, ground.sent[number]) for number in numbers]
    truth = ground.truth.of(numbers)

    def attacked(sent: Sequence[Sent], place: int) -> Guesses:
        view = view_of(
            ground, knowledge, part, sent, defended=bool(ground.twins), effort="quick",
            progress=lambda share: course.advance((place + share) / 4),
        )  # fmt: skip
        return attack.run(view)

    def scored(guesses: Guesses) -> float:
        main = main_of(attack, score(guesses, truth, attack.finds, seed=ground.seed))
        return 0.0 if main is None else main.value

    best = attacked(open_, 0)
    base = attacked(real, 1) if ground.twins else best
    if scored(best) - scored(base) < CLEAR:  # the run itself is open: the leak goes into traffic that holds nothing
        real = list(hush(open_, ground.seed))
        base = attacked(real, 2)
    mixed, leaked = inject(real, open_, ground.recorded.truth, share=LEAK, seed=ground.seed)
    together = dataclasses.replace(
        base,
        tokens={n: t for n, t in base.tokens.items() if n not in leaked}
        | {n: t for n, t in best.tokens.items() if n in leaked},
    )
    found = main_of(attack, score(attacked(mixed, 3), truth, attack.finds, seed=ground.seed))
    if found is None:
        raise UsageError("The rows hold no token that counts.", hint="audit a run of rows with text")
    return check_sensitivity(
        attack.name, knowledge.short, ground=scored(base), expected=scored(together), mixed=found, share=LEAK
    )
