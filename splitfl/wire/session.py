"""Who may say what when. No I/O here: messages in, verdicts out, so that both roles can be tested against each other.

A session has one table, `TABLE`: state -> message kind -> next state. Both sides walk the same table, each from its own
end: the party moves when it sends a request, the owner when it receives it. They need not be in the same state at the
same moment, so the table allows for messages in flight: an answer may still arrive after the party has said hello again
or goodbye.

What the table cannot say is code, and it is only this:

- `steps`: which step a request or an answer may name.
- A hello must state the session's `Terms`, and a welcome must answer a hello.
- The protocol's `Disclosure` is asked first. What it does not list neither leaves nor is accepted.

A check never changes anything: a message that is refused leaves the session as it was.

Whoever changes the table changes `docs/wire.md` and the matrix in `tests/wire/test_session.py` with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from splitfl.errors import printable
from splitfl.privacy.disclosure import Direction, Disclosure
from splitfl.wire.frames import TENSORS_OF, Sender
from splitfl.wire.messages import (
    WIRE_VERSION,
    AnyMessage,
    Bye,
    Closed,
    CodingName,
    DtypeName,
    Hello,
    Refused,
    Welcome,
    kind,
)
from splitfl.wire.steps import MAX_OPEN, NotAllowed, Request, Steps, Turn

__all__ = ["TABLE", "NotAllowed", "OwnerSession", "PartySession", "Session", "State", "Terms", "Turn"]


class State(Enum):
    """Where a session stands, seen from one side."""

    NEW = "new"
    GREETING = "greeting"
    """The first hello is said and not yet answered."""
    OPEN = "open"
    REOPENING = "reopening"
    """Hello was said again, after a lost link; steps and caches are still held."""
    CLOSING = "closing"
    """Goodbye was said; answers may still be on their way."""
    CLOSED = "closed"


TABLE: dict[State, dict[str, State]] = {
    State.NEW: {
        "hello": State.GREETING,
        "welcome": State.OPEN,  # two hellos were said: the first was refused, the second is welcomed
        "refused": State.NEW,
    },
    State.GREETING: {
        "hello": State.GREETING,
        "bye": State.CLOSING,
        "welcome": State.OPEN,
        "refused": State.NEW,
        "closed": State.CLOSED,
    },
    State.OPEN: {
        "hello": State.REOPENING,
        "forward": State.OPEN,
        "backward": State.OPEN,
        "release": State.OPEN,
        "fetch": State.OPEN,
        "bye": State.CLOSING,
        "welcome": State.OPEN,  # two hellos were said, and both are welcomed
        "forward_done": State.OPEN,
        "backward_done": State.OPEN,
        "piece": State.OPEN,
        "refused": State.OPEN,
        "closed": State.CLOSED,
    },
    State.REOPENING: {
        "hello": State.REOPENING,
        "bye": State.CLOSING,
        "welcome": State.OPEN,
        "forward_done": State.REOPENING,
        "backward_done": State.REOPENING,
        "piece": State.REOPENING,
        "refused": State.REOPENING,
        "closed": State.CLOSED,
    },
    State.CLOSING: {
        "bye": State.CLOSING,
        "welcome": State.CLOSING,
        "forward_done": State.CLOSING,
        "backward_done": State.CLOSING,
        "piece": State.CLOSING,
        "refused": State.CLOSING,
        "closed": State.CLOSED,
    },
    State.CLOSED: {"bye": State.CLOSED, "refused": State.CLOSED, "closed": State.CLOSED},
}

_PARTY_SAYS = frozenset({"hello", "forward", "backward", "release", "fetch", "bye"})
_DIRECTIONS: dict[Sender, Direction] = {"party": "party to owner", "owner": "owner to party"}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What both sides hold to for a whole session; every hello states it."""

    session: int
    protocol: str
    trunk: str
    plan: str
    wire_dtype: DtypeName
    memory: Literal["keep", "recompute"] = "keep"
    """What the party asks for; the welcome may fall back to ``recompute``."""
    hidden_coding: CodingName = "raw"
    gradient_coding: CodingName = "raw"

    def hello(self) -> Hello:
        """The hello that states these terms."""
        return Hello(
            session=self.session,
            version=WIRE_VERSION,
            protocol=self.protocol,
            trunk=self.trunk,
            plan=self.plan,
            wire_dtype=self.wire_dtype,
            memory=self.memory,
            hidden_coding=self.hidden_coding,
            gradient_coding=self.gradient_coding,
        )


class Session:
    """One side's view of a conversation. Ask it before a message leaves and as soon as one has come.

    Args:
        role: which side this is.
        terms: what the conversation is about; every hello must state exactly this.
        disclosure: of the session's protocol.
    """

    def __init__(self, role: Sender, terms: Terms, disclosure: Disclosure) -> None:
        self.role: Sender = role
        self.terms, self.disclosure = terms, disclosure
        self.state = State.NEW
        self.welcome: Welcome | None = None
        """The owner's latest limits, once it has answered a hello."""
        self._hellos = 0
        self._steps = Steps()

    def send(self, message: AnyMessage) -> Turn:
        """Whether this side may now send `message`, whose `tensors` must be set (`frames.describe`).

        Raises:
            NotAllowed: with a code from `REFUSAL_CODES`.
        """
        return self._take(message, self.role)

    def receive(self, message: AnyMessage) -> Turn:
        """Whether the other side was allowed to send `message`.

        Raises:
            NotAllowed: with a code from `REFUSAL_CODES`.
        """
        return self._take(message, "owner" if self.role == "party" else "party")

    def kept_steps(self) -> tuple[int, ...]:
        """Steps that await their backward, oldest first."""
        return tuple(self._steps.kept)

    def open_requests(self) -> tuple[Request, ...]:
        """Kind and step of each request without an answer, oldest first: what a party repeats after a lost link."""
        return tuple(self._steps.opened)

    def _take(self, message: AnyMessage, sender: Sender) -> Turn:
        self._check_sender(message, sender)
        self._check_disclosure(message, sender)
        after = self._next_state(message, sender)
        turn = self._judge(message)
        self._steps.apply(message)
        self._count_hellos(message)
        self.state = after
        return turn

    def _check_sender(self, message: AnyMessage, sender: Sender) -> None:
        if (kind(message) in _PARTY_SAYS) != (sender == "party"):
            raise NotAllowed(f"A {kind(message)!r} message is not for the {sender} to send.", code="out_of_order")
        if message.session != self.terms.session:
            raise NotAllowed(f"A {kind(message)!r} message belongs to another session.", code="unknown_session")

    def _check_disclosure(self, message: AnyMessage, sender: Sender) -> None:
        word = kind(message)
        names = tuple(spec.name for spec in message.tensors)
        if not self.disclosure.allows(word, names, _DIRECTIONS[sender]):
            carried = f" with {', '.join(names)}" if names else ""
            protocol = printable(self.terms.protocol, limit=80)
            raise NotAllowed(
                f"The protocol {protocol!r} does not let the {sender} send a {word!r} message{carried}.",
                code="not_disclosed",
                expected="what the protocol's disclosure lists",
                hint="leave it out, or choose a protocol that discloses it",
            )
        required, _ = TENSORS_OF.get(word, (frozenset(), frozenset()))
        if not required <= set(names):
            # Also guards the sender: a message that is not described yet would pass as one that discloses nothing.
            raise NotAllowed(
                f"A {word!r} message is without its tensor.", code="malformed", expected=", ".join(sorted(required))
            )

    def _next_state(self, message: AnyMessage, sender: Sender) -> State:
        legal = TABLE[self.state]
        if kind(message) not in legal:
            allowed = ", ".join(word for word in legal if (word in _PARTY_SAYS) == (sender == "party"))
            raise NotAllowed(
                f"A {kind(message)!r} message is not allowed while the session is {self.state.value}.",
                code="out_of_order",
                expected=allowed or "nothing",
                hint="say hello first" if self.state is State.NEW else None,
            )
        return legal[kind(message)]

    def _judge(self, message: AnyMessage) -> Turn:
        match message:
            case Hello():
                self._check_terms(message)
                return Turn.NEW if self.state in (State.NEW, State.OPEN) else Turn.RETRY
            case Welcome():
                self._check_welcome(message)
                return Turn.RETRY if self.state in (State.OPEN, State.CLOSING) else Turn.NEW
            case Bye() | Closed():
                return Turn.RETRY if TABLE[self.state][kind(message)] is self.state else Turn.NEW
            case _:
                return self._steps.judge(message)

    def _check_terms(self, message: Hello) -> None:
        ours = self.terms.hello()
        for name, code in (("version", "version"), ("protocol", "protocol"), ("trunk", "plan"), ("plan", "plan")):
            said, held = str(getattr(message, name)), str(getattr(ours, name))
            if said != held:
                raise NotAllowed(
                    f"The hello names the {name} {printable(said, limit=80)!r}.",
                    code=code,
                    expected=repr(held),
                    hint="use a kit that this owner wrote, a protocol that it serves, and the same splitfl release",
                )
        said_how, held_how = _how(message), _how(ours)
        if said_how != held_how:
            raise NotAllowed(
                "The hello asks for another wire dtype, memory or coding than this session has.",
                code="out_of_order",
                expected=", ".join(held_how),
                hint="open a new session for other terms",
            )

    def _check_welcome(self, message: Welcome) -> None:
        if self._hellos == 0 and not (self.role == "party" and message == self.welcome):  # the same one once more
            raise NotAllowed("A welcome answers no hello.", code="out_of_order", expected="one welcome a hello")
        if message.memory == "keep" and self.terms.memory == "recompute":
            raise NotAllowed(
                "The welcome says 'keep' where the party asked for 'recompute'.",
                code="out_of_order",
                expected="what was asked, or less",
            )

    def _count_hellos(self, message: AnyMessage) -> None:
        match message:
            case Hello():
                self._hellos = min(self._hellos + 1, MAX_OPEN)
            case Welcome():
                self._hellos = max(self._hellos - 1, 0)
                self.welcome = message
            case Refused() if self.state in (State.NEW, State.GREETING):
                self._hellos = max(self._hellos - 1, 0)


def _how(message: Hello) -> tuple[str, ...]:
    return message.wire_dtype, message.memory, message.hidden_coding, message.gradient_coding


class OwnerSession(Session):
    """The model owner's view."""

    def __init__(self, terms: Terms, disclosure: Disclosure) -> None:
        super().__init__("owner", terms, disclosure)


class PartySession(Session):
    """The data holder's view."""

    def __init__(self, terms: Terms, disclosure: Disclosure) -> None:
        super().__init__("party", terms, disclosure)
