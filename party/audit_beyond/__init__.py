"""What an audit looks at beside the traffic: the adapter, updates, the trunk, the proofs, and a lying owner.

    membership     was this row tuned on? from the loss before and after               whoever gets the adapter
    lira           the same with shadow models                                         the same, with rows and time
    canary         rows and planted secrets that the adapter gives back                the same
    update-invert  bags of tokens from an adapter or update in the clear               coordinator, or owner
    extract        a student of the owner's trunk from what came back                  the data holder
    dp-audit       whether the claimed epsilon can be contradicted                     as strong as the claim allows
    hijack         what false gradients would gain                                     a lying owner

One file each, with an `EXAMINATION`. Those that train for minutes are run only when they are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias

from party.audit_jobs import Ground
from party.rundir import RunDirectory
from splitfl.audit.examined import Examined
from splitfl.audit.results import Outcome
from splitfl.config_audit import AuditSettings

_FILES = ("members", "shadows", "learnt", "updates", "taken", "proofs", "lying")
Progress: TypeAlias = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Site:
    """What an examination may look at: it is the holder's own instrument, and no attacker."""

    ground: Ground
    run: RunDirectory
    settings: AuditSettings


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One of them."""

    name: str
    """As in ``splitfl audit --attack``."""
    knowledge: str
    """``K1`` to ``K3`` for the list of what was left out; ``any`` where that says nothing."""
    default: bool
    """Whether it is run unless told otherwise."""
    needs_traffic: bool
    """Whether it is about what was recorded; the others can be had of any run with an adapter."""
    why_not: Callable[[Site], str | None]
    """Why it is left out; None if it is not."""
    run: Callable[[Site, Progress], Outcome | Examined | str]
    """What came out, or why nothing did."""


def examinations() -> dict[str, Examination]:
    """All of them, by name."""
    found = [import_module(f"{__name__}.{file}").EXAMINATION for file in _FILES]
    return {each.name: each for each in found}
