"""The attacks of one audit: what each is given, what it costs, what it scores, and what was left out and why."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from party.audit_choice import Choice, Part
from party.recorded import Recorded
from splitfl.audit.attack import Attack
from splitfl.audit.controls import check_negative, shuffle
from splitfl.audit.results import Cost, Outcome, Shown, Traffic, named
from splitfl.audit.scoring import Truth, main_of, name_of, score
from splitfl.audit.view import Domain, Effort, Guesses, Knowledge, Noise, Sent, View
from splitfl.errors import SplitflError
from splitfl.kit import Kit
from splitfl.metrics import peak_rss_bytes

WORST = 10
"""Reconstructions that the report shows."""
FORWARD = frozenset({"hidden", "output", "gradient"})


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What all attacks of an audit share."""

    kit: Kit
    recorded: Recorded
    choice: Choice
    truth: Truth
    sent: Mapping[int, Sent]
    """As it crossed, by number."""
    twins: Mapping[int, Sent]
    """The same, undefended; empty where there is nothing to undo."""
    auxiliary: tuple[tuple[int, ...], ...]
    labelled: tuple[tuple[tuple[int, ...], int], ...]
    domain: Domain
    model: Path | None
    causal: bool
    effort: Effort
    seed: int

    @property
    def auxiliary_tokens(self) -> int:
        """Of the attacker's own text."""
        return sum(map(len, self.auxiliary))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attack with one knowledge on one kind of traffic."""

    attack: Attack
    knowledge: Knowledge
    traffic: Traffic
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """For people and for files."""
        return f"{self.attack.name} {self.knowledge.short}" + (", undefended" if self.traffic == "undefended" else "")

    @property
    def numbers(self) -> frozenset[int]:
        """Of all parts."""
        return frozenset(number for _, numbers in self.parts for number in numbers)


def why_not(attack: Attack, knowledge: Knowledge, ground: Ground) -> str | None:
    """Why an attack is left out; None if it is not."""
    needs = attack.needs
    if "update" in needs:  # what it says is of many rows at once, and scores here are of single ones
        return "what an update tells is not held against the run's rows by this command yet"
    missing = {
        "causal": (ground.causal, "the bottom is not causal: each position depends on all others"),
        "auxiliary": (bool(ground.auxiliary), "the attacker has no text of its own"),
        "labelled": (bool(ground.labelled), "the attacker has no text with an attribute (a labelled --auxiliary)"),
        "model": (ground.model is not None, "the whole model was not given (--model)"),
        "embedding cut": (ground.kit.plan.bottom == 0, "the cut is not at the embeddings"),
        "language model": (ground.kit.plan.task == "causal-lm", "the model is a classifier"),
        "classifier": (ground.kit.plan.task == "sequence-classification", "the model is no classifier"),
    }
    for need, (there, words) in missing.items():
        if need in needs and not there:
            return words
    if knowledge < attack.least:
        return f"it needs {attack.least.short}"
    if knowledge == Knowledge.SEED and ground.recorded.lora is None:
        return "the adapter did not begin from a seed that could be told"
    if needs & FORWARD and not _parts(attack, knowledge, ground):
        lacking = [name for name in sorted(needs & FORWARD) if not _any_has(ground, name)]
        if lacking:
            return f"no {lacking[0]} crossed"
        return "no row crossed with an adapter that is known"
    return None


def _any_has(ground: Ground, name: str) -> bool:
    return any(getattr(each, name) is not None for each in ground.sent.values())


def _parts(attack: Attack, knowledge: Knowledge, ground: Ground) -> tuple[Part, ...]:
    """What an attack is run on: once for each adapter that it is given."""
    if not attack.needs & FORWARD:
        return ((None, ()),)
    offered: Sequence[Part] = ground.choice.moments[:1] if attack.taught else ground.choice.moments
    if knowledge != Knowledge.EXACT:
        offered = ((None, ground.choice.whole),)

    def fits(number: int) -> bool:
        each = ground.sent.get(number)
        return each is not None and all(getattr(each, name) is not None for name in attack.needs & FORWARD)

    left, kept = attack.rows or len(ground.sent), []
    for folder, numbers in offered:
        some = tuple(filter(fits, numbers))[:left]
        left -= len(some)
        if some:
            kept.append((folder, some))
    return tuple(kept)


def plan_jobs(attack: Attack, knowledge: Knowledge, ground: Ground) -> list[Job]:
    """The attack on what crossed and, where that was defended, on its undefended twin first."""
    parts = _parts(attack, knowledge, ground)
    kinds: list[Traffic] = ["undefended"] if ground.twins and attack.needs & FORWARD else []
    return [Job(attack=attack, knowledge=knowledge, traffic=kind, parts=parts) for kind in [*kinds, "as it crossed"]]


def view_of(
    ground: Ground, knowledge: Knowledge, part: Part, sent: Sequence[Sent], *, defended: bool,
    progress: Callable[[float], None] = lambda share: None, effort: Effort | None = None,
) -> View:  # fmt: skip
    """All that the attacker gets."""
    recorded = ground.recorded
    return View(
        kit=ground.kit,
        knowledge=knowledge,
        sent=tuple(sent),
        updates=recorded.updates,
        noise=recorded.noise if defended else Noise(),
        gradient_noise=recorded.gradient_noise if defended else Noise(),
        adapter=part[0] if knowledge == Knowledge.EXACT else None,
        lora=recorded.lora if knowledge == Knowledge.SEED else None,
        model=ground.model,
        auxiliary=ground.auxiliary,
        labelled=ground.labelled,
        domain=ground.domain,
        seed=ground.seed,
        effort=effort or ground.effort,
        progress=progress,
    )


def do(job: Job, ground: Ground, *, progress: Callable[[float], None], texts: bool) -> Outcome | str:
    """Run an attack and score it; why not, where it says that it cannot be run on this."""
    defended = job.traffic == "as it crossed"
    source = ground.sent if defended else ground.twins
    found: list[Guesses] = []
    started = time.monotonic()
    with _peak() as peak:
        for place, part in enumerate(job.parts):
            view = view_of(
                ground, job.knowledge, part, [source[number] for number in part[1]], defended=defended,
                progress=lambda share, place=place: progress((place + share) / len(job.parts)),  # type: ignore[misc]
            )  # fmt: skip
            try:
                found.append(job.attack.run(view))
            except SplitflError as error:
                return error.problem
    seconds = time.monotonic() - started
    guesses = merged(found)
    truth = ground.truth.of(job.numbers) if job.attack.needs & FORWARD else ground.truth
    figures = score(guesses, truth, job.attack.finds, seed=ground.seed)
    main = main_of(job.attack, figures)
    if main is None:
        return "it said nothing that could be held against these rows"
    shuffled = score(guesses, shuffle(truth, ground.seed), job.attack.finds, seed=ground.seed)
    return Outcome(
        **named(job.attack, knowledge=job.knowledge.short, traffic=job.traffic),
        domain=ground.domain if job.attack.needs & {"auxiliary", "labelled"} else "none",
        records=main.records,
        sends=len(truth.rows),
        figures=figures,
        cost=Cost(
            seconds=seconds,
            peak_rss_bytes=peak[0],
            queries=guesses.notes.get("queries"),
            auxiliary_tokens=ground.auxiliary_tokens if "auxiliary" in job.attack.needs else 0,
        ),
        notes=dict(guesses.notes),
        shown=_worst(guesses, truth) if texts and job.attack.finds == "tokens" else (),
        negative=check_negative(job.attack.name, job.knowledge.short, shuffled),
    )


def merged(found: Sequence[Guesses]) -> Guesses:
    """The guesses of several parts; figures about the attack are added up."""
    if len(found) == 1:
        return found[0]
    notes: dict[str, float] = {}
    for each in found:
        for name, value in each.notes.items():
            notes[name] = notes.get(name, 0.0) + value
    return Guesses(
        tokens={n: t for each in found for n, t in each.tokens.items()},
        answers={n: t for each in found for n, t in each.answers.items()},
        classes={n: c for each in found for n, c in each.classes.items()},
        scores={n: s for each in found for n, s in each.scores.items()},
        bags={n: b for each in found for n, b in each.bags.items()},
        notes=notes,
    )


def _worst(guesses: Guesses, truth: Truth) -> tuple[Shown, ...]:
    """The rows that were read best, each once."""
    best: dict[tuple[str, int], Shown] = {}
    for row in truth.rows:
        guess = guesses.tokens.get(row.number)
        counts = ~row.special
        if guess is None or not bool(counts.any()):
            continue
        full = torch.full_like(row.ids, -1)
        full[: len(guess)] = guess[: len(full)]
        right = float(((full == row.ids) & counts).sum() / counts.sum())
        held = best.get(name_of(row))
        if held is None or right > held.share:
            best[name_of(row)] = Shown(
                dataset=row.dataset,
                row=row.row,
                share=right,
                original=tuple(row.ids.tolist()),
                guess=tuple(full.tolist()),
                special=tuple(row.special.tolist()),
            )
    # Among rows that were read alike the longest first: it says the most.
    return tuple(sorted(best.values(), key=lambda each: (each.share, len(each.original)), reverse=True)[:WORST])


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """The most memory of this process inside the block, in the list's one place when it ends."""
    with contextlib.suppress(OSError):  # Linux forgets the peak so far; elsewhere it is that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    found = [0]
    yield found
    found[0] = peak_rss_bytes()
