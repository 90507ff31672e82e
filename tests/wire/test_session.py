import msgspec
import pytest

from protocols import PROTOCOLS
from splitfl.privacy.disclosure import Crossing, Disclosure
from splitfl.wire.frames import describe
from splitfl.wire.messages import (
    REFUSAL_CODES,
    Backward,
    BackwardDone,
    Bye,
    Closed,
    Forward,
    ForwardDone,
    Refused,
    Release,
    Welcome,
)
from splitfl.wire.session import TABLE, NotAllowed, OwnerSession, PartySession, State, Terms, Turn
from splitfl.wire.steps import MAX_ANSWERED, MAX_OPEN
from tests.wire.samples import SESSION, WELCOME, hidden, mask

TERMS = Terms(session=SESSION, protocol="split", trunk="trunk", plan="plan", wire_dtype="float32")
EVERYTHING = PROTOCOLS["split"].disclosure
ROLES = {"party": PartySession, "owner": OwnerSession}
PARTY_KINDS = {"hello", "forward", "backward", "release", "bye"}


def forward(step, keep=False, rows=2, **fields):
    message = Forward(session=SESSION, step=step, keep=keep, **fields)
    return describe(message, {"hidden": hidden(rows)})


def backward(step, rows=2):
    return describe(Backward(session=SESSION, step=step), {"gradient": hidden(rows)})


def forward_done(step, rows=2):
    return describe(ForwardDone(session=SESSION, step=step), {"hidden": hidden(rows)})


def backward_done(step, rows=2):
    return describe(BackwardDone(session=SESSION, step=step), {"gradient": hidden(rows)})


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


@pytest.fixture(params=["party", "owner"])
def fresh(request):
    return ROLES[request.param](TERMS, EVERYTHING)


@pytest.fixture
def opened(fresh):
    say(fresh, TERMS.hello(), WELCOME)
    return fresh


# ---- every state x every kind, against a matrix written by hand

# Each state is reached with a forward of step 0 that is open and steps 1 (kept) and 2 (its backward open) answered.
WORK = [
    forward(1, keep=True),
    forward_done(1),
    forward(2, keep=True),
    forward_done(2),
    backward(2),
    forward(3),
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
    "bye": BYE,
    "welcome": WELCOME,
    "forward_done": forward_done(3),
    "backward_done": backward_done(2),
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
bye           -         CLOSING   CLOSING    CLOSING    CLOSING  CLOSED
welcome       -         OPEN      OPEN       OPEN       CLOSING  -
forward_done  -         -         OPEN       REOPENING  CLOSING  -
backward_done -         -         OPEN       REOPENING  CLOSING  -
refused       NEW       NEW       OPEN       REOPENING  CLOSING  CLOSED
closed        -         CLOSED    CLOSED     CLOSED     CLOSED   CLOSED
"""
_HEAD, *_LINES = [line.split() for line in MATRIX.strip().splitlines()]
CELLS = [(State[s], line[0], nxt) for line in _LINES for s, nxt in zip(_HEAD, line[1:], strict=True)]


def test_the_matrix_is_complete():
    assert len(CELLS) == len(State) * len(SAID) == 60


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
    assert refusal(fresh, WELCOME) == "out_of_order"
    assert fresh.welcome == WELCOME


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


# ---- steps


def test_a_training_step(opened):
    turns = say(opened, forward(0, keep=True), forward_done(0), backward(0), backward_done(0))
    assert turns == [Turn.NEW] * 4
    assert opened.kept_steps() == opened.open_requests() == ()


def test_a_pipeline_of_steps(opened):
    say(opened, forward(0, keep=True), forward(1, keep=True), forward_done(0), backward(0), forward_done(1))
    assert opened.open_requests() == (("backward", 0),)
    assert opened.kept_steps() == (1,)
    say(opened, backward(1), backward_done(1), backward_done(0))
    assert opened.open_requests() == opened.kept_steps() == ()


def test_an_earlier_step_is_a_retry_whether_answered_or_not(opened):
    assert say(opened, forward(4), forward(4), forward_done(4), forward(4)) == [
        Turn.NEW,
        Turn.RETRY,
        Turn.NEW,
        Turn.RETRY,
    ]
    assert say(opened, forward_done(4), forward_done(4)) == [Turn.NEW, Turn.RETRY]


def test_a_backward_is_legal_once(opened):
    say(opened, forward(0, keep=True), forward_done(0))
    assert say(opened, backward(0), backward(0), backward_done(0), backward(0)) == [
        Turn.NEW,
        Turn.RETRY,
        Turn.NEW,
        Turn.RETRY,
    ]
    assert opened.kept_steps() == ()


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ([], "unknown_step"),
        ([forward(0), forward_done(0)], "unknown_step"),
        ([forward(0, keep=True)], "out_of_order"),
        ([forward(0, keep=True), forward_done(0), Release(session=SESSION, steps=(0,))], "unknown_step"),
        ([forward(0, keep=True), refused(0)], "unknown_step"),
        ([forward(1, keep=True), forward_done(1)], "unknown_step"),
    ],
    ids=["never sent", "not kept", "not answered", "released", "refused", "another step"],
)
def test_a_backward_needs_a_kept_step(opened, before, code):
    say(opened, *before)
    assert refusal(opened, backward(0)) == code


def test_a_forward_sent_again_after_its_backward_does_not_keep_the_step_again(opened):
    say(opened, forward(0, keep=True), forward_done(0), backward(0), backward_done(0), forward(0, keep=True))
    assert opened.kept_steps() == ()


def test_a_refused_backward_can_be_sent_again(opened):
    say(opened, forward(0, keep=True), forward_done(0), backward(0), refused(0, "busy"))
    assert say(opened, backward(0), backward_done(0)) == [Turn.NEW, Turn.NEW]


def test_a_request_sent_twice_may_be_refused_and_then_answered(opened):
    say(opened, forward(0), forward(0), refused(0, "busy"))
    assert opened.open_requests() == ()
    assert say(opened, forward_done(0)) == [Turn.RETRY]  # to be dropped: the party was told no
    assert say(opened, forward(0), forward_done(0)) == [Turn.RETRY, Turn.NEW]


def test_a_step_that_the_owner_lost_is_recovered_by_its_forward(opened):
    say(opened, forward(0, keep=True), forward_done(0), forward(1), forward_done(1), backward(0))
    say(opened, refused(0, "unknown_step"))
    assert refusal(opened, backward(0)) == "unknown_step"
    assert say(opened, forward(0, keep=True), forward_done(0)) == [Turn.RETRY, Turn.NEW]
    assert say(opened, backward(0), backward_done(0)) == [Turn.NEW, Turn.NEW]


def test_an_owner_that_restarted_takes_the_steps_up_again():
    party, owner = PartySession(TERMS, EVERYTHING), OwnerSession(TERMS, EVERYTHING)
    say(party, TERMS.hello(), WELCOME, forward(6, keep=True), forward_done(6), forward(7, keep=True), TERMS.hello())
    say(party, WELCOME)
    say(owner, TERMS.hello(), WELCOME)
    both = [forward(7, keep=True), forward(6, keep=True), forward_done(7), forward_done(6), backward(6), backward(7)]
    assert say(owner, *both) == [Turn.NEW, Turn.RETRY, Turn.NEW, Turn.NEW, Turn.NEW, Turn.NEW]
    say(party, *both)
    assert party.open_requests() == owner.open_requests() == (("backward", 6), ("backward", 7))


def test_an_answer_needs_a_request(opened):
    assert refusal(opened, forward_done(0)) == "out_of_order"
    say(opened, forward(0, keep=True))
    assert refusal(opened, backward_done(0)) == "out_of_order"
    assert refusal(opened, forward_done(1)) == "out_of_order"


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ([forward(0)], forward_done(0, rows=1)),
        ([forward(0)], forward(0, rows=1)),
        ([forward(0, keep=True), forward_done(0)], backward(0, rows=1)),
        ([forward(0, keep=True), forward_done(0), backward(0)], backward_done(0, rows=1)),
        ([forward(0), forward_done(0)], forward(0, rows=3)),
    ],
    ids=["answer", "retry", "gradient", "gradient's answer", "late retry"],
)
def test_a_step_has_one_shape(opened, before, message):
    say(opened, *before)
    assert refusal(opened, message) == "malformed"


def test_a_refusal_without_a_step_closes_nothing(opened):
    say(opened, forward(0), refused())
    assert opened.open_requests() == (("forward", 0),)


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
        session = PartySession(TERMS, protocol.disclosure)
        say(session, TERMS.hello(), WELCOME, BYE, CLOSED)
        assert session.state is State.CLOSED


# ---- bounds


def test_open_requests_are_bounded(opened):
    say(opened, *(forward(step) for step in range(MAX_OPEN)))
    assert refusal(opened, forward(MAX_OPEN)) == "too_large"
    assert say(opened, forward(0)) == [Turn.RETRY]
    say(opened, forward_done(3))
    assert say(opened, forward(MAX_OPEN)) == [Turn.NEW]


def test_kept_steps_are_bounded(opened):
    for step in range(MAX_OPEN):
        say(opened, forward(step, keep=True), forward_done(step))
    assert refusal(opened, forward(MAX_OPEN, keep=True)) == "too_large"
    say(opened, Release(session=SESSION, steps=(0,)), forward(MAX_OPEN, keep=True))
    assert len(opened.kept_steps()) == MAX_OPEN


def test_answered_steps_are_forgotten_in_the_end(opened):
    for step in range(MAX_ANSWERED + 1):
        say(opened, forward(step), forward_done(step))
    assert refusal(opened, forward_done(0)) == "out_of_order"
    assert say(opened, forward_done(1)) == [Turn.RETRY]
    assert say(opened, forward(0)) == [Turn.RETRY]


def test_welcomes_of_many_hellos_stay_bounded(fresh):
    say(fresh, *[TERMS.hello()] * (MAX_OPEN + 50))
    say(fresh, *[WELCOME] * MAX_OPEN)
    assert isinstance(fresh.welcome, Welcome)
    assert refusal(fresh, WELCOME) == "out_of_order"
