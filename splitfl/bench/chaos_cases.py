"""What `splitfl bench chaos` breaks: the designs that are run, and the faults that each seed draws a schedule of."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

from splitfl.bench.faults import Fault
from splitfl.bench.message_faults import Rates

Work: TypeAlias = Literal["tune", "generate", "replaced"]

STEPS, SAVE_STEPS, NEW_TOKENS = 12, 4, 24
_QUIET, _ROUGH = Rates(), Rates(drop=0.04, duplicate=0.12, delay=0.12, reorder=0.08)
_NOISE = ("--noise", "gauss", "--clip", "40", "--sigma", "0.5")
_BLOCK_S = 1.5  # longest fault of a link that lasts: a schedule shall not wait for minutes

PLAIN = ("--lora-dropout", "0.1", "--gradient-accumulation-steps", "2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One design under one kind of trouble."""

    name: str
    design: str
    """Whose undisturbed run it is compared with; cases of one design have the same options."""
    options: tuple[str, ...] = ()
    work: Work = "tune"
    rates: Rates = _QUIET
    link_faults: int = 0
    owner_kills: int = 0
    party_kills: int = 0
    same: bool = True
    """Whether the adapter, or the text, must be that of the undisturbed run: not where noise is drawn."""
    once: bool = False
    """Whether each batch may leave in one form only, and be booked once, whoever is killed."""


SPLIT = ("--protocol", "split", *PLAIN)
GRADFREE = ("--protocol", "guarded-gradfree", "--lora-dropout", "0.1")
NOISY_ONLINE = ("--protocol", "guarded-online", *_NOISE)
NOISY_GRADFREE = ("--protocol", "guarded-gradfree", *_NOISE)

CASES: tuple[Case, ...] = (
    Case(name="split, messages", design="split", options=SPLIT, rates=_ROUGH),
    Case(name="split, links", design="split", options=SPLIT, link_faults=5),
    Case(name="split, owner killed", design="split", options=SPLIT, owner_kills=2),
    Case(name="split, party killed", design="split", options=SPLIT, party_kills=2),
    Case(
        name="split, everything", design="split", options=SPLIT, rates=_ROUGH, link_faults=3, owner_kills=1,
        party_kills=1,
    ),
    Case(
        name="guarded-online with noise, everything", design="noisy online", options=NOISY_ONLINE, rates=_ROUGH,
        link_faults=3, owner_kills=1, party_kills=2, same=False, once=True,
    ),
    Case(
        name="guarded-gradfree, everything", design="gradfree", options=GRADFREE, rates=_ROUGH, link_faults=2,
        owner_kills=1, party_kills=2, once=True,
    ),
    Case(
        name="guarded-gradfree with noise, everything", design="noisy gradfree", options=NOISY_GRADFREE, rates=_ROUGH,
        link_faults=2, owner_kills=1, party_kills=2, same=False, once=True,
    ),
    Case(
        name="generate, everything", design="split", options=SPLIT, work="generate", rates=_ROUGH, link_faults=2,
        owner_kills=1,
    ),
    Case(name="another trunk at the address", design="split", options=SPLIT, work="replaced"),
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that happens once a share of the bytes of an undisturbed run has passed upwards."""

    share: float
    what: Literal["link", "owner", "party"]
    fault: Fault | None = None


def schedule(case: Case, seed: int) -> list[Event]:
    """The events of one run, in order; the same for the same case and seed."""
    draw = random.Random(f"{case.name}/{seed}")  # noqa: S311  a schedule, no secret
    events = [Event(draw.uniform(0.05, 0.9), "owner") for _ in range(case.owner_kills)]
    events += [Event(draw.uniform(0.05, 0.9), "party") for _ in range(case.party_kills)]
    events += [Event(draw.uniform(0.0, 0.95), "link", _link_fault(draw)) for _ in range(case.link_faults)]
    return sorted(events, key=lambda event: event.share)


def _link_fault(draw: random.Random) -> Fault:
    kind = draw.choice(("cut", "cut", "cut in a frame", "cut in a frame", "half open", "delay", "trickle", "refuse"))
    amount = {"delay": 0.02, "trickle": 2e5}.get(kind, 0.0)
    seconds = 0.0 if kind.startswith("cut") else draw.uniform(0.2, _BLOCK_S)
    return Fault(kind=kind, seconds=seconds, amount=amount)  # type: ignore[arg-type]
