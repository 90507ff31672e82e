"""Who may open a session at this owner, under which limits, and what is done when all places are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from model_owner.memory import Share
from model_owner.refusals import Refusal
from model_owner.sessions import HeldSession, SessionTable
from protocols import PROTOCOLS
from splitfl.cut import Plan
from splitfl.errors import printable
from splitfl.wire import frames as wire
from splitfl.wire.channel import Envelope
from splitfl.wire.messages import Hello
from splitfl.wire.session import OwnerSession, Terms

_FORGOTTEN_S = 60.0  # a session silent for so long gives way to another one of its party


class Admission(Protocol):
    """Who may speak: the allow-list, or everyone on an insecure loopback channel."""

    def allowed(self, public_key: bytes) -> str | None:
        """The party's name, or None if this key is not admitted."""

    def reload(self) -> None:
        """Look at the list again."""


class Everyone:
    """Admission for an insecure loopback channel, where there are no keys."""

    def allowed(self, public_key: bytes) -> str | None:
        """Anybody, under one name."""
        return "loopback"

    def reload(self) -> None:
        """Nothing ever changes."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What the owner allows any session."""

    max_tokens: int
    max_length: int
    max_sessions: int
    lease_s: float
    recompute: bool
    max_sessions_per_party: int = 4
    max_waiting_bytes: int = 1 << 30
    """What requests that wait for a worker may take together; one of each party always may."""
    deadline_s: float = 150.0
    """Work that its party has not asked for (again) for so long is dropped; a party that waits repeats it sooner."""
    cache_lease_s: float | None = None
    """An idle KV cache is dropped after so long; None with its session."""


def check_offer(message: Hello, plan: Plan) -> None:
    """Whether what a hello asks for is served here.

    Raises:
        Refusal: another protocol, or a kit of another model or cut.
    """
    served = [name for name, protocol in PROTOCOLS.items() if not protocol.whole]
    if message.protocol not in served:
        raise Refusal(
            f"Protocol {printable(message.protocol, 40)!r} is not served here.",
            code="protocol",
            expected=", ".join(served),
        )
    if (message.trunk, message.plan) != (plan.trunk, plan.digest):
        raise Refusal(
            f"The kit was cut from trunk {printable(message.trunk, 40)} with plan {printable(message.plan, 40)}.",
            code="plan",
            expected=f"trunk {plan.trunk} with plan {plan.digest}",
            hint="ask the owner for the kit that belongs to the model served here",
        )


def make_room(table: SessionTable, sender: str, limits: ServerLimits, most: int | None = None) -> HeldSession | None:
    """The session that has to end so that this party may open one more; None if there is room.

    Only a session of the same party gives way, and only one that seems forgotten: its process may have crashed.

    Args:
        table: all open sessions.
        sender: the party's key.
        limits: of the owner.
        most: sessions that this party may have, where its quota says so.

    Raises:
        Refusal: all places are in use.
    """
    own, most = table.of_party(sender), most or limits.max_sessions_per_party
    if len(own) < most and len(table) < limits.max_sessions:
        return None
    forgotten = [held for held in own if held.silent_for(_FORGOTTEN_S)]
    if forgotten:
        return min(forgotten, key=lambda held: held.last_heard)
    raise Refusal(
        f"{len(own)} sessions of this party are open already, {len(table)} of all parties.",
        code="busy",
        expected=f"at most {most} of a party and {limits.max_sessions} of all",
        hint="close one, or try again later",
    )


def new_session(
    message: Hello, party: str, envelope: Envelope, limits: ServerLimits, width: int, share: Share
) -> HeldSession:
    """The session that a first hello asks for; it is not entered in any table."""
    terms = Terms(
        session=message.session,
        protocol=message.protocol,
        trunk=message.trunk,
        plan=message.plan,
        wire_dtype=message.wire_dtype,
        memory=message.memory,
        hidden_coding=message.hidden_coding,
        gradient_coding=message.gradient_coding,
    )
    return HeldSession(
        key=(envelope.sender, message.session),
        party=party,
        talk=OwnerSession(terms, PROTOCOLS[message.protocol].disclosure),
        limits=wire.Limits(
            width=width,
            max_tokens=limits.max_tokens,
            max_length=limits.max_length,
            wire_dtype=message.wire_dtype,
            hidden_coding=message.hidden_coding,
            gradient_coding=message.gradient_coding,
        ),
        recompute=limits.recompute or message.memory == "recompute",
        routes=[envelope.route],
        budget=share,
    )
