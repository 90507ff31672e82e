import msgspec
import pytest

from protocols import PROTOCOLS
from splitfl.privacy.disclosure import Crossing, Disclosure
from splitfl.wire.frames import describe
from splitfl.wire.messages import (
    BackwardDone,
    Forward,
    Release,
)
from splitfl.wire.session import TABLE, NotAllowed, OwnerSession, PartySession, State, Terms, Turn
from tests.wire.samples import SESSION, WELCOME, hidden, mask
from tests.wire.talk import (
    BYE,
    CLOSED,
    EVERYTHING,
    PARTY_KINDS,
    ROLES,
    TERMS,
    backward,
    backward_done,
    fetch,
    forward,
    forward_done,
    piece,
    refusal,
    refused,
    say,
)

# ---- every state x every kind, against a matrix written by hand

# Each state is reached with a forward (3) and a fetch (4) that are open, and steps 1 (kept) and 2 (its backward open)
# answered.
WORK = [
    forward(1, keep=True),
    forward_done(1),
    forward(2, keep=True),
    forward_done(2),
    backward(2),
    forward(3),
    fetch(4),
]
ROADS = {
    State.NEW: [],
    State.GREETING: [TERMS.hello()],
    State.OPEN: [TERMS.hello(), TERMS.hello(), WELCOME, *WORK],
    State.REOPENING: [TERMS.hello(), WELCOME, *WORK, TERMS.hello()],
    State.CLOSING: [TERMS.hello(), TERMS.hello(), WELCOME, *WORK, BYE],
    State.CLOSED: [TERMS.hello(), WELCOME, *WORK, BYE, CLOSED],
}
SAID = {
    "hello": TERMS.hello(),
    "forward": forward(9),
    "backward": backward(1),
    "release": Release(session=SESSION, steps=(1,)),
    "fetch": fetch(9),
    "bye": BYE,
    "welcome": WELCOME,
    "forward_done": forward_done(3),
    "backward_done": backward_done(2),
    "piece": piece(4),
    "refused": refused(),
    "closed": CLOSED,
}
# Next state, or "-" where the message is out of order.
MATRIX = """
              NEW       GREETING  OPEN       REOPENING  CLOSING  CLOSED
hello         GREETING  GREETING  REOPENING  REOPENING  -        -
forward       -         -         OPEN       -          -        -
backward      -         -         OPEN       -          -        -
release       -         -         OPEN       -          -        -
fetch         -         -         OPEN       -          -        -
bye           -         CLOSING   CLOSING    CLOSING    CLOSING  CLOSED
welcome       -         OPEN      OPEN       OPEN       CLOSING  -
forward_done  -         -         OPEN       REOPENING  CLOSING  -
backward_done -         -         OPEN       REOPENING  CLOSING  -
piece         -         -         OPEN       REOPENING  CLOSING  -
refused       NEW       NEW       OPEN       REOPENING  CLOSING  CLOSED
closed        -         CLOSED    CLOSED     CLOSED     CLOSED   CLOSED
"""
_HEAD, *_LINES = [line.split() for line in MATRIX.strip().splitlines()]
CELLS = [(State[s], line[0], nxt) for line in _LINES for s, nxt in zip(_HEAD, line[1:], strict=True)]


def test_the_matrix_is_complete():
    assert len(CELLS) == len(State) * len(SAID) == 72


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("state", "word", "expected"), CELLS)
def test_every_message_in_every_state(role, state, word, expected):
    session = ROLES[role](TERMS, EVERYTHING)
    say(session, *ROADS[state])
    assert session.state is state
    if expected == "-":
        assert refusal(session, SAID[word]) == "out_of_order"
    else:
        say(session, SAID[word])
        assert session.state is State[expected]


def test_the_table_holds_no_word_that_is_not_a_message():
    assert set().union(*TABLE.values()) == set(SAID)


@pytest.mark.parametrize("word", SAID)
def test_nobody_speaks_for_the_other_side(fresh, word):
    wrong_way = fresh.receive if (word in PARTY_KINDS) == (fresh.role == "party") else fresh.send
    with pytest.raises(NotAllowed) as caught:
        wrong_way(SAID[word])
    assert caught.value.code == "out_of_order"


@pytest.mark.parametrize("word", SAID)
def test_another_session_is_not_this_one(opened, word):
    assert refusal(opened, msgspec.structs.replace(SAID[word], session=SESSION + 1)) == "unknown_session"


# ---- greetings


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("version", 99, "version"),
        ("protocol", "gradfree", "protocol"),
        ("trunk", "another", "plan"),
        ("plan", "another", "plan"),
        ("wire_dtype", "bfloat16", "out_of_order"),
        ("memory", "recompute", "out_of_order"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_hello_states_the_terms_each_time(fresh, field, value, code, again):
    if again:
        say(fresh, TERMS.hello(), WELCOME)
    assert refusal(fresh, msgspec.structs.replace(TERMS.hello(), **{field: value})) == code


def test_a_welcome_answers_one_hello(fresh):
    assert refusal(fresh, WELCOME) == "out_of_order"
    assert say(fresh, TERMS.hello(), TERMS.hello()) == [Turn.NEW, Turn.RETRY]
    assert say(fresh, WELCOME, WELCOME) == [Turn.NEW, Turn.RETRY]
    assert refusal(fresh, msgspec.structs.replace(WELCOME, max_tokens=9)) == "out_of_order"
    assert fresh.welcome == WELCOME


def test_a_welcome_that_comes_once_more_ends_no_run():
    """It was repeated on the way; an owner may not say it once more by itself."""
    party, owner = PartySession(TERMS, EVERYTHING), OwnerSession(TERMS, EVERYTHING)
    for session in (party, owner):
        say(session, TERMS.hello(), WELCOME)
    assert say(party, WELCOME, WELCOME) == [Turn.RETRY, Turn.RETRY]
    assert refusal(owner, WELCOME) == "out_of_order"


def test_a_refused_hello_can_be_said_again(fresh):
    say(fresh, TERMS.hello(), TERMS.hello(), refused(code="busy"))
    assert fresh.state is State.NEW
    say(fresh, WELCOME)  # the answer to the second
    assert fresh.state is State.OPEN


def test_the_owner_may_give_less_memory_but_not_more():
    less = msgspec.structs.replace(WELCOME, memory="recompute")
    session = PartySession(TERMS, EVERYTHING)
    say(session, TERMS.hello(), less)
    assert session.welcome.memory == "recompute"
    modest = Terms(**{**TERMS.__dict__, "memory": "recompute"})
    session = PartySession(modest, EVERYTHING)
    say(session, modest.hello())
    assert refusal(session, WELCOME) == "out_of_order"


def test_a_reconnect_keeps_the_steps(opened):
    say(opened, forward(0, keep=True), forward_done(0), TERMS.hello())
    assert say(opened, WELCOME, backward(0)) == [Turn.NEW, Turn.NEW]


# ---- disclosure


def only(*listed):
    """A disclosure of just these (message, tensor) crossings, both ways."""
    return Disclosure(
        crossings=tuple(
            Crossing(message=m, tensor=t, direction=d, content="", how_often="", bound="none")
            for m, t in listed
            for d in ("party to owner", "owner to party")
        ),
        never=(),
        in_plain_words="",
    )


NO_GRADIENTS = only(
    ("hello", None), ("welcome", None), ("forward", "hidden"), ("forward_done", "hidden"), ("refused", None)
)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "message",
    [
        backward(0),
        backward_done(0),
        BYE,
        describe(Forward(session=SESSION, step=1), {"hidden": hidden(), "mask": mask()}),
    ],
    ids=["gradient", "gradient back", "goodbye", "mask"],
)
def test_what_the_protocol_does_not_disclose_neither_leaves_nor_is_accepted(role, message):
    session = ROLES[role](TERMS, NO_GRADIENTS)
    say(session, TERMS.hello(), WELCOME, forward(0, keep=True), forward_done(0))
    assert refusal(session, message) == "not_disclosed"


def test_disclosed_in_one_direction_only():
    one_way = Disclosure(
        crossings=tuple(
            c for c in EVERYTHING.crossings if (c.message, c.direction) != ("forward_done", "owner to party")
        ),
        never=(),
        in_plain_words="",
    )
    session = PartySession(TERMS, one_way)
    say(session, TERMS.hello(), WELCOME, forward(0))
    assert refusal(session, forward_done(0)) == "not_disclosed"


def test_a_message_that_is_not_described_yet_does_not_pass_as_one_without_tensors(opened):
    assert refusal(opened, Forward(session=SESSION, step=0)) == "malformed"
    assert refusal(opened, BackwardDone(session=SESSION, step=0)) == "malformed"


def test_every_served_protocol_lets_a_session_open_and_close():
    for protocol in PROTOCOLS.values():
        if protocol.whole:  # no owner is asked for anything
            continue
        session = PartySession(TERMS, protocol.disclosure)
        say(session, TERMS.hello(), WELCOME, BYE, CLOSED)
        assert session.state is State.CLOSED
