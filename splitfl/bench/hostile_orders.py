"""How an attacker of `splitfl bench hostile` is started, and what it says."""

from __future__ import annotations

from typing import Literal, TypeAlias

from splitfl.bench.orders import Line

Name: TypeAlias = Literal[
    "connections",
    "storm",
    "greetings",
    "garbage",
    "lying headers",
    "hellos",
    "replayed",
    "slow reader",
    "adversarial floats",
]


class AttackStart(Line, frozen=True, kw_only=True):
    """The first argument of its command line."""

    attack: Name
    owner: str
    owner_key: str
    key: str
    kit: str
    connections: int = 0


class TellMe(Line, frozen=True, kw_only=True, tag="tell"):
    """Ask how far it is."""


class Attacked(Line, frozen=True, kw_only=True):
    """How far it is."""

    sent: int
    """Messages or connections."""
    opened: int
    """Most connections at one time."""
    problem: str
