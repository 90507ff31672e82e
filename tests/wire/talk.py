"""Messages of one session, and how a test says them."""

import pytest

from protocols import PROTOCOLS
from splitfl.privacy.disclosure import Disclosure
from splitfl.wire.frames import describe
from splitfl.wire.messages import (
    REFUSAL_CODES,
    Backward,
    BackwardDone,
    Bye,
    Closed,
    Fetch,
    Forward,
    ForwardDone,
    Piece,
    Refused,
)
from splitfl.wire.session import NotAllowed, OwnerSession, PartySession, Terms
from tests.wire.samples import SESSION, content, hidden

TERMS = Terms(session=SESSION, protocol="split", trunk="trunk", plan="plan", wire_dtype="float32")
EVERYTHING = Disclosure(
    crossings=(*PROTOCOLS["split"].disclosure.crossings, *PROTOCOLS["guarded-offline"].disclosure.crossings),
    never=(),
    in_plain_words="every message there is; no protocol lists all of them",
)
ROLES = {"party": PartySession, "owner": OwnerSession}
PARTY_KINDS = {"hello", "forward", "backward", "release", "fetch", "bye"}


def forward(step, keep=False, rows=2, **fields):
    message = Forward(session=SESSION, step=step, keep=keep, **fields)
    return describe(message, {"hidden": hidden(rows)})


def backward(step, rows=2):
    return describe(Backward(session=SESSION, step=step), {"gradient": hidden(rows)})


def forward_done(step, rows=2):
    return describe(ForwardDone(session=SESSION, step=step), {"hidden": hidden(rows)})


def backward_done(step, rows=2):
    return describe(BackwardDone(session=SESSION, step=step), {"gradient": hidden(rows)})


def fetch(step, file=1, offset=0, length=4):
    return Fetch(session=SESSION, step=step, file=file, offset=offset, length=length)


def piece(step, file=1, offset=0, size=4, total=10):
    message = Piece(session=SESSION, step=step, file=file, offset=offset, total=total)
    return describe(message, {"piece": content(size)})


def refused(step=None, code="busy"):
    return Refused(session=SESSION, code=code, problem="No.", step=step)


BYE, CLOSED = Bye(session=SESSION), Closed(session=SESSION)


def say(session, *messages):
    """Each message through `session`, in or out as its kind demands; the verdicts."""
    turns = []
    for message in messages:
        ours = (message.__struct_config__.tag in PARTY_KINDS) == (session.role == "party")
        turns.append(session.send(message) if ours else session.receive(message))
    return turns


def refusal(session, message):
    """The code with which `session` refuses `message`; it must be as if nothing had been said."""
    before = (session.state, session.kept_steps(), session.open_requests(), session.welcome)
    with pytest.raises(NotAllowed) as caught:
        say(session, message)
    assert (session.state, session.kept_steps(), session.open_requests(), session.welcome) == before
    assert caught.value.code in REFUSAL_CODES
    return caught.value.code
