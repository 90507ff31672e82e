import msgspec
import pytest

from splitfl.wire.messages import (
    Release,
    Welcome,
)
from splitfl.wire.session import OwnerSession, PartySession, Turn
from splitfl.wire.steps import MAX_ANSWERED, MAX_OPEN
from tests.wire.samples import SESSION, WELCOME
from tests.wire.talk import EVERYTHING, TERMS, backward, backward_done, forward, forward_done, refusal, refused, say

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


def test_a_refused_retry_does_not_lose_the_step(opened):
    say(opened, forward(0, keep=True), forward_done(0), forward(0, keep=True), refused(0, "busy"))
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
    if fresh.role == "party":  # the same one once more: an answer that was repeated on the way says nothing new
        say(fresh, WELCOME)
    other = msgspec.structs.replace(WELCOME, max_tokens=WELCOME.max_tokens + 1)
    assert refusal(fresh, other if fresh.role == "party" else WELCOME) == "out_of_order"
