"""Both roles against each other, over a link that delays, loses and is cut; driven by hypothesis."""

from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitfl.wire.messages import Release
from splitfl.wire.session import NotAllowed, OwnerSession, PartySession, State, Turn
from splitfl.wire.steps import MAX_ANSWERED, MAX_FETCHES, MAX_OPEN
from tests.wire.samples import SESSION, WELCOME
from tests.wire.talk import (
    BYE,
    CLOSED,
    EVERYTHING,
    TERMS,
    backward,
    backward_done,
    fetch,
    forward,
    forward_done,
    piece,
    refused,
)


class Conversation(RuleBasedStateMachine):
    """A party and an owner that keep to the rules must never be refused by each other.

    The owner answers what it has accepted, in any order a scheduler may choose. A cut loses what is on its way in both
    directions; the party then says hello and sends every open request again, as it would after `PartySocket` says that
    the link is up. An owner that restarts has forgotten everything and refuses what it does not know.
    """

    def __init__(self):
        super().__init__()
        self.party = PartySession(TERMS, EVERYTHING)
        self.owner = OwnerSession(TERMS, EVERYTHING)
        self.up, self.down = deque(), deque()
        self.work = []
        self.next_step = 0
        self.shapes = {}
        self.parts = {}
        self.answered_new = set()
        self.restarted = False

    # -- the party

    @rule()
    def party_says_hello(self):
        if self.party.state in (State.NEW, State.GREETING, State.OPEN, State.REOPENING):
            self.party.send(TERMS.hello())
            self.up.append(TERMS.hello())

    @precondition(lambda self: self.party.state is State.OPEN)
    @rule(keep=st.booleans(), rows=st.integers(1, 2), skip=st.integers(0, 2))
    def party_asks_forward(self, keep, rows, skip):
        self.next_step += skip
        message = forward(self.next_step, keep=keep, rows=rows)
        self.shapes[self.next_step] = (rows, keep)
        self.next_step += 1
        assert self.party.send(message) is Turn.NEW
        self.up.append(message)

    @precondition(lambda self: self.party.state is State.OPEN and self.party.kept_steps())
    @rule(data=st.data())
    def party_asks_backward(self, data):
        step = data.draw(st.sampled_from(self.party.kept_steps()))
        if ("forward", step) in self.party.open_requests() and step not in self.answered_new:
            return
        message = backward(step, rows=self.shapes[step][0])
        self.party.send(message)
        self.up.append(message)

    @precondition(lambda self: self.party.state is State.OPEN and self.shapes)
    @rule(data=st.data())
    def party_repeats_a_forward(self, data):
        step = data.draw(st.sampled_from(sorted(self.shapes)))
        rows, keep = self.shapes[step]
        assert self.party.send(forward(step, keep=keep, rows=rows)) is Turn.RETRY
        self.up.append(forward(step, keep=keep, rows=rows))

    @precondition(lambda self: self.party.state is State.OPEN and self.party.open_requests())
    @rule()
    def party_repeats_what_is_open(self):
        for word, step in self.party.open_requests():
            if word == "fetch":
                message = fetch(step, offset=self.parts[step])
            else:
                rows, keep = self.shapes[step]
                message = forward(step, keep=keep, rows=rows) if word == "forward" else backward(step, rows=rows)
            assert self.party.send(message) is Turn.RETRY
            self.up.append(message)

    @precondition(lambda self: self.party.state is State.OPEN and self.fetches() < MAX_FETCHES)
    @rule(offset=st.integers(0, 9))
    def party_fetches(self, offset):
        self.parts[self.next_step] = offset
        message = fetch(self.next_step, offset=offset)
        self.next_step += 1
        assert self.party.send(message) is Turn.NEW
        self.up.append(message)

    def fetches(self):
        """Fetches without an answer, at either side: the owner may have accepted what the party takes for lost."""
        asked = {*self.party.open_requests(), *self.owner.open_requests()}
        return sum(word == "fetch" for word, _ in asked)

    @precondition(lambda self: self.party.state is State.OPEN and self.shapes)
    @rule(data=st.data())
    def party_releases(self, data):
        step = data.draw(st.sampled_from(sorted(self.shapes)))
        message = Release(session=SESSION, steps=(step,))
        self.party.send(message)
        self.up.append(message)

    @precondition(lambda self: self.party.state in (State.GREETING, State.OPEN, State.REOPENING))
    @rule(sure=st.integers(0, 4))
    def party_says_goodbye(self, sure):
        if sure == 0:
            self.party.send(BYE)
            self.up.append(BYE)

    # -- the owner

    @precondition(lambda self: self.up)
    @rule()
    def owner_reads(self):
        message = self.up.popleft()
        word = message.__struct_config__.tag
        try:
            turn = self.owner.receive(message)
        except NotAllowed as refusal:
            if not (self.restarted or self.owner.state is State.CLOSED):
                raise  # only an owner that has forgotten, or has closed, may refuse a party that keeps to the rules
            self.say(refused(getattr(message, "step", None), refusal.code))
            return
        if word in ("hello", "bye"):
            self.say(WELCOME if word == "hello" else CLOSED)
        elif word in ("forward", "backward", "fetch"):
            self.work.append((word, message.step, turn))

    @precondition(lambda self: self.work)
    @rule(data=st.data(), busy=st.integers(0, 5))
    def owner_answers(self, data, busy):
        word, step, _ = self.work.pop(data.draw(st.integers(0, len(self.work) - 1)))
        if self.owner.state is State.CLOSED:
            return
        if word == "fetch":
            offset = self.parts[step]
            self.say(piece(step, offset=offset, size=min(4, 10 - offset)))
            return
        rows = self.shapes[step][0]
        if busy == 0 and (word, step) in self.owner.open_requests() and not self.twice(step):
            self.say(refused(step, "busy"))
        elif self.owner._steps._known((word, step)):  # a request that was refused and not sent again has no answer
            self.say(forward_done(step, rows) if word == "forward" else backward_done(step, rows))

    def twice(self, step):
        """Whether the step's forward and backward are both open, so that a refusal would not say which it means."""
        return {("forward", step), ("backward", step)} <= set(self.party.open_requests() + self.owner.open_requests())

    @precondition(lambda self: self.owner.state in (State.OPEN, State.REOPENING))
    @rule(sure=st.integers(0, 9))
    def owner_closes(self, sure):
        if sure == 0:
            self.say(CLOSED)

    @rule(sure=st.integers(0, 19))
    def owner_restarts(self, sure):
        """Everything at the owner is gone; the link goes down with it."""
        if sure == 0:
            self.owner = OwnerSession(TERMS, EVERYTHING)
            self.work.clear()
            self.restarted = True
            self.link_is_cut(0)

    def say(self, message):
        self.owner.send(message)
        self.down.append(message)

    # -- the link

    @precondition(lambda self: self.down)
    @rule()
    def party_reads(self):
        message = self.down.popleft()
        turn = self.party.receive(message)  # never refused: this owner keeps to the rules
        word = message.__struct_config__.tag
        if word == "forward_done":
            if turn is Turn.NEW:
                self.answered_new.add(message.step)
            else:
                assert message.step in self.answered_new

    @rule(sure=st.integers(0, 3))
    def link_is_cut(self, sure):
        if sure == 0:
            self.up.clear()
            self.down.clear()
            if self.party.state in (State.GREETING, State.OPEN, State.REOPENING):
                self.party.send(TERMS.hello())
                self.up.append(TERMS.hello())

    # -- what always holds

    @invariant()
    def memory_is_bounded(self):
        for session in (self.party, self.owner):
            steps = session._steps
            assert len(steps.opened) <= MAX_OPEN
            assert len(steps.kept) <= 2 * MAX_OPEN
            assert len(steps.answered) <= MAX_ANSWERED
            assert len(steps.refused) <= MAX_ANSWERED

    @invariant()
    def the_owner_keeps_only_what_the_party_asked_to_keep(self):
        assert all(self.shapes[step][1] for step in self.owner.kept_steps())


TestConversation = Conversation.TestCase
TestConversation.pytestmark = [pytest.mark.slow]  # half a minute
TestConversation.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
