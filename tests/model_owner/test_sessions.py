"""What is held for each session, and when it goes."""

from __future__ import annotations

import time

import pytest
import torch

from model_owner.memory import MemoryBudget, Share
from model_owner.sessions import HeldCache, HeldSession, SessionTable
from model_owner.trunk import Kept
from protocols import PROTOCOLS
from splitfl.link import TrunkRequest
from splitfl.wire.frames import Limits
from splitfl.wire.session import OwnerSession, Terms

LIMIT = 10_000


@pytest.fixture
def budget():
    return MemoryBudget(LIMIT)


@pytest.fixture
def table():
    return SessionTable(lease_s=100.0)


def held_session(table, budget, sender="a" * 40, number=1, max_tokens=16):
    terms = Terms(session=number, protocol="split", trunk="t", plan="p", wire_dtype="float32")
    held = HeldSession(
        key=(sender, number),
        party="somebody",
        talk=OwnerSession(terms, PROTOCOLS["split"].disclosure),
        limits=Limits(width=4, max_tokens=max_tokens, max_length=16, wire_dtype="float32"),
        recompute=False,
        routes=[b"\0abcd"],
        budget=table.share(sender, budget),
    )
    table.add(held)
    return held


def kept(tokens=2):
    hidden = torch.zeros(1, tokens, 4)
    return Kept(request=TrunkRequest(hidden=hidden), entry=hidden, output=hidden)


def reserve(held, amount):
    assert held.budget.take(amount)
    return amount


def test_a_session_is_found_under_its_own_key_alone(table, budget):
    held = held_session(table, budget)
    assert table.find(("a" * 40, 1)) is held
    assert table.find(("b" * 40, 1)) is None
    assert table.find(("a" * 40, 2)) is None


def test_everything_held_is_given_back(table, budget):
    held = held_session(table, budget)
    held.keep(1, kept(), reserve(held, 100))
    held.keep(2, kept(), reserve(held, 200))
    held.caches[7] = HeldCache(object(), reserve(held, 50))
    assert budget.used == 350
    held.drop_step(1)
    held.drop_step(1)
    held.drop_cache(99)
    assert budget.used == 250
    held.keep(2, kept(), reserve(held, 10))
    assert budget.used == 60
    table.remove(held)
    assert budget.used == 0
    assert held.budget.used == 0
    assert len(table) == 0


def test_a_step_whose_graph_is_spent_holds_its_input_alone(table, budget):
    held = held_session(table, budget)
    held.keep(1, kept(tokens=3), reserve(held, 1000))
    held.spend_step(1)
    held.spend_step(1)
    held.spend_step(2)
    step, reserved = held.kept[1]
    assert (step.entry, step.output) == (None, None)
    assert step.request.hidden.shape == (1, 3, 4)
    assert reserved == budget.used == 3 * 4 * 4
    held.drop_step(1)
    assert budget.used == 0


def test_removing_a_session_does_not_remove_its_successor(table, budget):
    first = held_session(table, budget)
    second = held_session(table, budget)
    table.remove(first)
    assert table.find(second.key) is second


def test_sessions_of_one_party_share_its_part(table, budget):
    first, second = held_session(table, budget, number=1), held_session(table, budget, number=2)
    other = held_session(table, budget, sender="b" * 40)
    assert first.budget is second.budget
    assert other.budget is not first.budget
    assert isinstance(other.budget, Share)
    assert len(table.of_party("a" * 40)) == 2


def test_a_silent_session_expires_unless_something_is_under_way(table, budget, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("model_owner.sessions.time.monotonic", lambda: now[0])
    silent, working = held_session(table, budget, number=1), held_session(table, budget, number=2)
    silent.last_heard = working.last_heard = now[0]
    working.under_way["forward", 1] = time.monotonic()
    now[0] += 99.9
    assert table.expired() == []
    now[0] += 0.2
    assert table.expired() == [silent]
    working.under_way.clear()
    assert table.expired() == [silent, working]


def frames(tokens):
    return [b"header", memoryview(bytes(tokens * 4 * 4))]


def test_the_last_few_replies_are_remembered(table, budget):
    held = held_session(table, budget, max_tokens=1000)
    for step in range(10):
        held.remember(("forward", step), frames(1))
    assert [step for _, step in held.replies] == [6, 7, 8, 9]


def test_replies_take_no_more_than_one_largest_message(table, budget):
    held = held_session(table, budget, max_tokens=16)
    for step in range(10):
        held.remember(("forward", step), frames(8))
        assert sum(len(each[1]) for each in held.replies.values()) <= 16 * 4 * 4
    assert [step for _, step in held.replies] == [8, 9]
    held.remember(("forward", 11), frames(16))
    assert [step for _, step in held.replies] == [11]


def test_a_reply_made_again_counts_as_the_last(table, budget):
    held = held_session(table, budget, max_tokens=1000)
    for step in (1, 2, 3, 4, 1, 5):
        held.remember(("forward", step), frames(1))
    assert [step for _, step in held.replies] == [3, 4, 1, 5]


def test_the_last_places_where_a_party_was_heard_are_remembered(table, budget):
    held = held_session(table, budget)
    for route in (b"1", b"2", b"3", b"1", b"1", b"4", b"5"):
        held.heard(route)
    assert held.routes == [b"3", b"1", b"4", b"5"]
