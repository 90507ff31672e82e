"""Taking all the room there is: kept steps, caches, sessions, waiting requests, answers that are not fetched."""

from __future__ import annotations

import pytest
import torch

from splitfl.wire.messages import Bye, Closed, Forward, Refused, Release, Welcome
from splitfl.wire.steps import MAX_OPEN
from tests.hostile.attacker import attacker, attackers, new_number, within

pytestmark = pytest.mark.slow


def zeros(foe, rows, length):
    return torch.zeros(rows, length, foe.plan.width)


def release(foe, steps=(), caches=()):
    foe.say(Release(session=foe.number, steps=tuple(steps), caches=tuple(caches)))


def test_kept_steps_are_refused_when_the_budget_is_full_and_given_back(foe, besieged):
    """The owner first goes over to keeping inputs alone; the honest party still finds room."""
    foe.opened()
    kept, refused = foe.fill(((step, {"keep": True}) for step in range(1000)), zeros(foe, 4, 128))
    assert refused.code == "busy"
    assert len(kept) > 5
    release(foe, steps=kept)
    again, refused = foe.fill(((step, {"keep": True}) for step in range(1000, 2000)), zeros(foe, 4, 128))
    assert refused.code == "busy"
    assert abs(len(again) - len(kept)) <= 3  # the honest party holds now more, now less


def test_goodbye_gives_everything_back(lone_foe):
    foe, counts = lone_foe, []
    for _ in range(2):
        foe.opened()
        counts.append(len(foe.fill(((step, {"keep": True}) for step in range(1000)), zeros(foe, 4, 128))[0]))
        foe.say(Bye(session=foe.number))
        assert isinstance(foe.answer(), Closed)
    assert counts[0] == counts[1]


def test_a_second_session_gets_no_second_share(lone_foe, owner):
    """What a party may hold is counted for all its sessions together."""
    foe = lone_foe.opened()
    kept, _ = foe.fill(((step, {"keep": True}) for step in range(1000)), zeros(foe, 4, 128))
    assert kept
    with attacker(owner) as other:
        other.opened().forward(1, zeros(other, 4, 128), keep=True)
        other.refused("busy")


def test_small_steps_are_limited_in_number(foe):
    foe.opened()
    kept, refused = foe.fill(((step, {"keep": True}) for step in range(1000)), zeros(foe, 1, 1))
    assert refused.code in ("too_large", "busy")
    assert len(kept) <= MAX_OPEN
    release(foe, steps=kept)
    foe.forward(5000, zeros(foe, 1, 1), keep=True)
    foe.result()


def test_caches_are_refused_when_the_budget_is_full_and_given_back(lone_foe):
    foe = lone_foe.opened()
    held, refused = foe.fill(((step, {"cache": step}) for step in range(1000)), zeros(foe, 4, 100))
    assert refused.code == "busy"
    assert len(held) > 5
    release(foe, caches=held)
    again, refused = foe.fill(((step, {"cache": step}) for step in range(1000, 2000)), zeros(foe, 4, 100))
    assert refused.code == "busy"
    assert len(again) == len(held)


def test_small_caches_are_limited_in_number(foe):
    foe.opened()
    held, refused = foe.fill(((step, {"cache": step}) for step in range(1000)), zeros(foe, 1, 1))
    assert refused.code == "busy"
    assert len(held) <= 256
    release(foe, caches=held[:1])
    foe.forward(2000, zeros(foe, 1, 1), cache=2000)
    foe.result()


def test_a_cache_that_cannot_grow_is_dropped(lone_foe):
    foe = lone_foe.opened()
    large, _ = foe.fill(((step, {"cache": step}) for step in range(100)), zeros(foe, 4, 100))
    foe.fill(((step, {"cache": step}) for step in range(100, 300)), zeros(foe, 1, 10))
    foe.forward(300, zeros(foe, 4, 20), cache=large[0], past=100)
    foe.refused("busy")
    foe.forward(301, zeros(foe, 4, 20), cache=large[0], past=100)
    foe.refused("unknown_cache")
    foe.forward(302, zeros(foe, 4, 100), cache=400)  # in its place
    foe.result()


def test_one_party_cannot_take_all_sessions(foe, owner, honest):
    """Half a thousand hellos: four are welcomed, and another session of the honest party still is."""
    numbers = [new_number() for _ in range(500)]
    came = []
    for number in numbers:
        foe.hello(number)
        came.append(foe.answer())
    assert [type(answer) for answer in came[:4]] == [Welcome] * 4
    assert {answer.code for answer in came[4:] if isinstance(answer, Refused)} == {"busy"}
    assert not any(isinstance(answer, Welcome) for answer in came[4:])
    with owner.session() as second:
        assert second.welcome is not None


def test_hello_again_and_again_is_one_session(foe):
    for _ in range(300):
        foe.hello()
        assert isinstance(foe.answer(), Welcome)
    for _ in range(3):
        foe.hello(new_number())
        assert isinstance(foe.answer(), Welcome)
    foe.hello(new_number())
    foe.refused("busy")


def test_requests_that_wait_are_limited_in_bytes(foe):
    """Large requests in one go: some are answered, the others refused at once; none is left waiting."""
    foe.opened()
    count = 60
    for step in range(count):
        foe.forward(step, zeros(foe, 4, 128))
    codes = set()
    for _ in within(60):
        came = foe.answer()
        if isinstance(came, Refused):
            codes.add(came.code)
            break
    assert codes == {"busy"}
    # Whatever of the answers was lost because nobody fetched it: the session is as good as new.
    foe.hello(new_number())
    for _ in within(60):
        if isinstance(foe.answer(), Welcome):
            break


def test_a_party_that_never_reads_hurts_itself_alone(besieged, owner):
    """Its answers pile up at its own link until they are dropped."""
    with attackers(owner, 3) as foes:
        for foe in foes:
            foe.link.set_hwm(1)
            foe.hello()
        for step in range(150):
            for foe in foes:
                foe.say(Forward(session=foe.number, step=step), hidden=zeros(foe, 1, 128))


def test_many_sessions_at_work_at_once(besieged, owner):
    with attackers(owner, 4) as foes:
        for foe in foes:
            foe.opened()
        for step in range(20):
            for foe in foes:
                foe.forward(step, zeros(foe, 4, 128))
            for foe in foes:
                foe.result()
