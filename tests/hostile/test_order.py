"""Messages that are sound one by one, said at the wrong time, twice, or about somebody else's session."""

from __future__ import annotations

import pytest
import torch

from splitfl.link import TrunkRequest
from splitfl.wire.messages import Backward, BackwardDone, Bye, Closed, Forward, Refused, Release, Welcome
from splitfl.wire.steps import MAX_OPEN
from tests.hostile.attacker import attacker, within


@pytest.fixture
def hidden(foe):
    return torch.randn(2, 3, foe.plan.width, generator=torch.Generator().manual_seed(3))


def test_nothing_works_before_hello(foe, hidden):
    foe.forward(1, hidden)
    foe.backward(1, hidden)
    foe.say(Release(session=foe.number, caches=(1,), steps=(1,)))
    foe.say(Bye(session=foe.number))
    for _ in range(4):
        foe.refused("unknown_session")


def test_nothing_works_after_goodbye(foe, hidden):
    foe.opened().forward(1, hidden, keep=True)
    foe.result()
    foe.say(Bye(session=foe.number))
    assert isinstance(foe.answer(), Closed)
    foe.backward(1, hidden)
    foe.refused("unknown_session")
    foe.opened().backward(1, hidden)
    foe.refused("unknown_step")


def test_a_hello_with_other_terms_changes_nothing(foe, hidden):
    foe.opened()
    foe.hello(wire_dtype="bfloat16")
    foe.refused("out_of_order")
    foe.hello(memory="recompute")
    foe.refused("out_of_order")
    foe.hello()
    assert isinstance(foe.answer(), Welcome)
    foe.forward(1, hidden)
    assert foe.result().dtype == torch.float32


def test_a_backward_needs_a_forward_that_was_to_be_kept(foe, hidden):
    foe.opened().backward(1, hidden)
    assert foe.refused("unknown_step").step == 1
    foe.forward(1, hidden)
    foe.result()
    foe.backward(1, hidden)
    foe.refused("unknown_step")


def test_a_backward_of_another_shape_is_refused_and_the_step_stays(foe, hidden):
    foe.opened().forward(1, hidden, keep=True)
    foe.result()
    foe.backward(1, hidden[:1])
    assert foe.refused("malformed").step == 1
    foe.backward(1, hidden)
    assert foe.result().shape == hidden.shape


def test_a_backward_said_twice_is_answered_twice_with_the_same_bytes(foe, hidden):
    foe.opened().forward(1, hidden, keep=True)
    foe.result()
    foe.backward(1, hidden)
    first = foe.result()
    foe.backward(1, hidden)
    assert torch.equal(foe.result(), first)
    foe.backward(1, 2 * hidden)  # a retry is answered from memory: what it carries is not looked at
    assert torch.equal(foe.result(), first)


def test_a_backward_sent_together_with_its_forward_is_refused_or_answered(foe, hidden):
    foe.opened()
    foe.forward(1, hidden, keep=True)
    foe.backward(1, hidden)
    came = {type(foe.answer()).__name__ for _ in range(2)}
    assert "ForwardDone" in came


def test_a_step_used_again_must_have_its_old_shape(foe, hidden):
    foe.opened().forward(5, hidden)
    first = foe.result()
    foe.forward(5, hidden[:1])
    assert foe.refused("malformed").step == 5
    foe.forward(5, hidden)
    assert torch.equal(foe.result(), first)


def test_steps_may_go_down_and_leave_gaps(foe, hidden):
    foe.opened()
    results = []
    for step in (2**62, 7, 3, 0, 2**63 - 1):
        foe.forward(step, hidden)
        results.append(foe.result())
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_flood_of_requests_is_not_all_taken_in(foe, hidden):
    """What is refused is refused at once, so among the first answers there are refusals."""
    foe.opened()
    for step in range(4 * MAX_OPEN):
        foe.forward(step, hidden)
    for _ in within(30):
        came = foe.answer()
        assert not isinstance(came, Refused) or came.code in ("too_large", "busy")
        if isinstance(came, Refused):
            break


def test_a_session_of_somebody_else_is_not_found(foe, honest, hidden):
    theirs = honest.session.terms.session
    foe.forward(10_000, hidden, session=theirs)
    foe.say(Backward(session=theirs, step=1), gradient=hidden)
    foe.say(Release(session=theirs, caches=tuple(range(500)), steps=tuple(range(500))))
    foe.say(Bye(session=theirs))
    for _ in range(4):
        foe.refused("unknown_session")


def test_the_same_number_is_another_session_for_another_party(foe, honest, hidden):
    """Even while the honest party's step is kept and its cache is filled."""
    foe.hello(honest.session.terms.session)
    assert isinstance(foe.answer(), Welcome)
    foe.say(Release(session=honest.session.terms.session, caches=tuple(range(2000)), steps=tuple(range(2000))))
    foe.say(Forward(session=honest.session.terms.session, step=2000, cache=1, past=1), hidden=hidden)
    foe.refused("unknown_cache")
    foe.say(Bye(session=honest.session.terms.session))
    assert isinstance(foe.answer(), Closed)


def test_releasing_what_does_not_exist_is_harmless(foe, hidden):
    foe.opened().forward(1, hidden, keep=True)
    foe.result()
    for _ in range(100):
        foe.say(Release(session=foe.number, caches=tuple(range(1000)), steps=tuple(range(2, 1000))))
    foe.backward(1, hidden)
    assert isinstance(foe.answer(), BackwardDone)


def test_a_step_released_while_it_waits_is_not_kept(foe, hidden):
    foe.opened()
    foe.forward(1, hidden, keep=True)
    foe.say(Release(session=foe.number, steps=(1,)))
    foe.result()
    foe.backward(1, hidden)
    foe.refused("unknown_step")


def test_a_kept_step_survives_what_an_attacker_releases(owner, honest, trunk):
    hidden = torch.randn(2, 3, trunk.plan.width, generator=torch.Generator().manual_seed(4))
    request = TrunkRequest(hidden=hidden, keep=True)
    output, step = honest.session.forward(request)
    expected, there = honest.local.forward(request)
    with attacker(owner) as foe:
        number = honest.session.terms.session
        foe.hello(number)
        assert isinstance(foe.answer(), Welcome)
        foe.say(Release(session=number, caches=(1,), steps=(step,)))
        foe.say(Backward(session=number, step=step), gradient=hidden)
        foe.refused("unknown_step")
    assert torch.equal(output, expected)
    assert torch.equal(honest.session.backward(step, hidden), honest.local.backward(there, hidden))
