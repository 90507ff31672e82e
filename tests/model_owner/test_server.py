"""The owner's loop with everything around it: who is admitted, for how long, and how it ends."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from contextlib import closing

import pytest
import torch

from splitfl.errors import RefusedError, UnreachableError
from splitfl.link import TrunkRequest
from splitfl.wire.messages import Bye, Closed, Forward, Release, Welcome
from tests.live.owner import PARTIES
from tests.model_owner.serving import PATIENCE_S, raw, serving
from tests.model_owner.training import prepare, run, train


@pytest.fixture
def hidden(trunk):
    return torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(8))


class Asking:
    """A request in a thread of its own: its result, or what it raised."""

    def __init__(self, function, *arguments):
        self.result, self.error = None, None
        self._thread = threading.Thread(target=self._run, args=(function, *arguments), name="asking")
        self._thread.start()

    def _run(self, function, *arguments):
        try:
            self.result = function(*arguments)
        except Exception as error:
            self.error = error

    def join(self):
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "never answered"
        return self


# ---- the same results, however it is served


SERVED = {
    "keep": {},
    "recompute": {"recompute": True},
    "budget for inputs alone": {"budget": 6_000},
    "two workers": {"workers": 2},
    "a lease as short as can be": {"lease_s": 1e-9},
}


@pytest.mark.parametrize("how", SERVED)
def test_training_is_the_same_however_it_is_served(kit, trunk, undisturbed, tmp_path, how):
    with serving(trunk, tmp_path, **SERVED[how]) as owner:
        with closing(owner.session()) as session:
            train(kit, session).assert_equals(undisturbed)
            assert session.welcome.memory == ("recompute" if how == "recompute" else "keep")
        owner.until(lambda: not owner.server.table)
        assert owner.budget.used == 0
        assert owner.server.counters.backwards == 8


def test_training_is_the_same_when_the_party_asks_for_recompute(kit, trunk, undisturbed, tmp_path):
    with serving(trunk, tmp_path) as owner, closing(owner.session(memory="recompute")) as session:
        assert session.welcome.memory == "recompute"
        train(kit, session).assert_equals(undisturbed)


def test_two_parties_at_once_learn_what_each_learns_alone(kit, trunk, undisturbed, tmp_path):
    with serving(trunk, tmp_path, workers=2) as owner:
        with closing(owner.session(PARTIES[0])) as one, closing(owner.session(PARTIES[1])) as two:
            models = [prepare(kit, session) for session in (one, two)]
            for asking in [Asking(run, model) for model in models]:
                assert asking.join().error is None
                asking.result.assert_equals(undisturbed)
        assert owner.server.counters.sessions == 2


# ---- admission


def test_a_revoked_key_is_refused_at_its_next_message(trunk, tmp_path, hidden):
    with (
        serving(trunk, tmp_path) as owner,
        closing(owner.session(PARTIES[0])) as session,
        closing(owner.session(PARTIES[1])) as other,
    ):
        expected, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
        assert owner.budget.used
        owner.allow.revoke(PARTIES[0])
        started = time.monotonic()
        with pytest.raises(RefusedError) as refused:
            session.backward(step, hidden)
        assert refused.value.code == "revoked"
        owner.until(lambda: len(owner.server.table) == 1)
        assert time.monotonic() - started < 2.0
        assert owner.budget.used == 0
        with pytest.raises(RefusedError) as refused:
            session.forward(TrunkRequest(hidden=hidden))
        assert refused.value.code == "revoked"
        assert torch.equal(other.forward(TrunkRequest(hidden=hidden))[0], expected)


def test_a_key_revoked_while_its_request_waits_gets_no_result(trunk, tmp_path, hidden):
    with serving(trunk, tmp_path) as owner:
        with closing(owner.session()) as session, owner.busy():
            asking = [Asking(session.forward, TrunkRequest(hidden=hidden, keep=True))]
            owner.until(lambda: any(held.under_way for held in owner.server.table))
            owner.allow.revoke(PARTIES[0])
            owner.until(lambda: not owner.server.table)
            asking[0].join()
            assert asking[0].error.code == "revoked"
        owner.until(lambda: not owner.server._tasks)
        assert owner.server.counters.forwards == 0  # it was dropped before it was computed
        assert owner.budget.used == 0


def test_a_reload_ends_revoked_sessions_at_once(trunk, tmp_path):
    with serving(trunk, tmp_path) as owner, closing(owner.session()):
        owner.allow.revoke(PARTIES[0])
        owner.do(owner.server.reload_admission)
        assert owner.held() == []


def test_upkeep_survives_what_goes_wrong(trunk, tmp_path, hidden, monkeypatch):
    with serving(trunk, tmp_path) as owner, closing(owner.session()) as session:
        seen = []

        def fail(key):
            seen.append(key)
            raise OSError("no more file handles")

        with monkeypatch.context() as patch:
            patch.setattr(owner.allow, "allowed", fail)
            with pytest.raises(RefusedError) as refused:
                session.forward(TrunkRequest(hidden=hidden))
            assert refused.value.code == "internal"
            owner.until(lambda: len(seen) >= 3)
        session.forward(TrunkRequest(hidden=hidden))
        owner.allow.revoke(PARTIES[0])
        owner.until(lambda: not owner.server.table)


def test_places_are_limited_for_all_and_for_each_party(trunk, tmp_path, tiny_llama):
    with (
        serving(trunk, tmp_path, max_sessions=5, max_sessions_per_party=3) as owner,
        raw(owner, tiny_llama, PARTIES[0]) as one,
        raw(owner, tiny_llama, PARTIES[1]) as two,
    ):
        for number in range(3):
            one.hello(number)
            assert isinstance(one.answer(), Welcome)
        one.hello(3)
        assert "at most 3 of a party" in one.refused("busy").expected
        for number in range(2):
            two.hello(number)
            assert isinstance(two.answer(), Welcome)
        two.hello(2)
        two.refused("busy")
        one.say(Bye(session=0))
        assert isinstance(one.answer(), Closed)
        two.hello(2)
        assert isinstance(two.answer(), Welcome)


def test_a_partys_forgotten_session_gives_way_to_its_next_one(trunk, tmp_path, tiny_llama, hidden):
    """As after a crash: a new process opens a new session while the old one's lease still runs."""
    with serving(trunk, tmp_path, max_sessions_per_party=2) as owner, raw(owner, tiny_llama) as one:
        for number in (1, 2):
            one.hello(number)
            assert isinstance(one.answer(), Welcome)
        one.forward(1, hidden, session=1, keep=True)
        one.result()
        one.hello(3)
        one.refused("busy")

        def age():
            for held in owner.server.table:
                held.last_heard -= 100 - held.key[1]

        owner.do(age)
        one.hello(3)
        assert isinstance(one.answer(), Welcome)
        assert sorted(held.key[1] for held in owner.held()) == [2, 3]
        assert owner.budget.used == 0


# ---- the lease


def test_an_expired_session_gives_everything_back_and_opens_again_by_itself(trunk, tmp_path, hidden):
    with serving(trunk, tmp_path, lease_s=0.05) as owner, closing(owner.session()) as session:
        with owner.busy():  # the lease does not run while something is under way
            asking = Asking(session.forward, TrunkRequest(hidden=hidden, keep=True))
            owner.until(lambda: any(held.under_way for held in owner.server.table))
            owner.do(lambda: [setattr(held, "last_heard", 0.0) for held in owner.server.table])
            owner.do(owner.server._end_expired)
            assert len(owner.held()) == 1
        expected, step = asking.join().result
        owner.until(lambda: not owner.server.table)
        assert owner.budget.used == 0
        assert torch.equal(session.forward(TrunkRequest(hidden=hidden, cache=1))[0], expected)
        owner.until(lambda: not owner.server.table)
        # The cache is gone, and is filled again with what filled it.
        output, _ = session.forward(TrunkRequest(hidden=hidden[:, :1], cache=1, past=6))
        assert torch.equal(output, continued(trunk, hidden, hidden[:, :1])[-1])
        owner.until(lambda: not owner.server.table)
        back = session.backward(step, hidden)
        _, kept = trunk.forward_kept(TrunkRequest(hidden=hidden), recompute=False)
        assert torch.equal(back, trunk.backward(kept, hidden))


def continued(trunk, *parts, orders=()):
    """Outputs of `parts` put one behind the other into one cache of the trunk's own; `orders` moves its rows before."""
    cache, past, outputs = trunk.new_cache(), 0, []
    for part, order in itertools.zip_longest(parts, orders):
        outputs.append(trunk.forward(TrunkRequest(hidden=part, cache=1, past=past, rows=order), cache))
        past += part.shape[1]
    return outputs


def test_a_generation_goes_on_at_an_owner_that_has_forgotten_it(trunk, tmp_path, hidden):
    parts = [hidden, *(hidden[:, n : n + 1] for n in range(4))]
    orders = [None, None, (1, 0), None, (0, 0)]
    expected = continued(trunk, *parts, orders=orders)
    with serving(trunk, tmp_path) as owner, closing(owner.session()) as session:
        past, crossed = 0, []
        session.tap = lambda way, frames: crossed.append([bytes(f) for f in frames]) if way == "sent" else None
        for number, (part, order) in enumerate(zip(parts, orders, strict=True)):
            if number in (1, 4):
                owner.do(lambda: [owner.server._end(held) for held in owner.server.table])
            output, _ = session.forward(TrunkRequest(hidden=part, cache=1, past=past, rows=order))
            assert torch.equal(output, expected[number])
            past += part.shape[1]
        forwards = [frames for frames in crossed if len(frames) > 1]
        assert len(forwards) > len(parts)
        assert len({tuple(frames) for frames in forwards}) == len(parts), "a row crossed as other bytes than before"
        session.release(caches=(1,))
        session.forward(TrunkRequest(hidden=hidden))
        owner.do(lambda: [owner.server._end(held) for held in owner.server.table])
        with pytest.raises(RefusedError) as refused:  # what was given back is not kept for anybody
            session.forward(TrunkRequest(hidden=hidden[:, :1], cache=1, past=past))
        assert refused.value.code == "unknown_cache"


# ---- what is under way when a session ends


@pytest.mark.parametrize("fields", [{}, {"keep": True}, {"cache": 1}], ids=["plain", "kept", "cached"])
@pytest.mark.parametrize("end", ["bye", "revoked", "released"])
def test_nothing_is_left_of_a_request_whose_session_ends(trunk, tmp_path, tiny_llama, hidden, fields, end):
    with serving(trunk, tmp_path) as owner, raw(owner, tiny_llama) as one:
        one.opened()
        with owner.busy():
            for step in (1, 2):
                one.forward(step, hidden, **fields)
            owner.until(lambda: sum(len(held.under_way) for held in owner.server.table) == 2)
            if end == "bye":
                one.say(Bye(session=one.number))
                assert isinstance(one.answer(), Closed)
            elif end == "revoked":
                owner.allow.revoke(PARTIES[0])
                one.refused("revoked")
            else:
                one.say(Release(session=one.number, steps=(1, 2), caches=(1,)))
        owner.until(lambda: not owner.server._tasks)
        if end == "released":  # a cache is filled again by the second request, which began later
            one.result()
            one.result()
            one.say(Release(session=one.number, caches=(1,)))
            one.hello()
            assert isinstance(one.answer(), Welcome)
        assert owner.budget.used == 0
        assert owner.server.waiting_bytes == 0
        owner.do(lambda: owner.allow.add(owner.keys / f"{PARTIES[0]}.key"))


def test_a_session_opened_again_under_its_number_is_a_new_one(trunk, tmp_path, tiny_llama, hidden):
    """The old one's request ends after that, and must not take the new one with it."""
    with serving(trunk, tmp_path) as owner, raw(owner, tiny_llama) as one:
        one.opened()
        with owner.busy():
            one.forward(1, hidden, keep=True)
            one.say(Bye(session=one.number))
            assert isinstance(one.answer(), Closed)
            one.opened()
        owner.until(lambda: not owner.server._tasks)
        assert len(owner.held()) == 1
        assert owner.budget.used == 0
        one.forward(1, hidden)
        assert torch.equal(one.result(), trunk.forward(TrunkRequest(hidden=hidden)))


def test_requests_that_wait_are_bounded_in_bytes(trunk, tmp_path, tiny_llama, hidden):
    """One of each session always may wait; more only while there is room."""
    size = hidden.nbytes
    with serving(trunk, tmp_path, max_waiting_bytes=4 * size) as owner:
        with raw(owner, tiny_llama, PARTIES[0]) as one, raw(owner, tiny_llama, PARTIES[1]) as two:
            one.opened(), two.opened()
            with owner.busy():
                for step in range(3):
                    one.forward(step, hidden)
                for step in range(3, 40):
                    one.forward(step, hidden)
                    assert one.refused("busy").step == step
                two.forward(1, hidden)
                owner.until(lambda: all(held.under_way for held in owner.server.table))
                assert owner.server.waiting_bytes < 6 * size
            two.result()
            for _ in range(3):
                one.result()
            one.forward(4, hidden)  # refused before, asked again
            one.result()
        assert owner.server.waiting_bytes == 0


# ---- the end


def test_stopping_answers_what_is_under_way_and_refuses_the_rest(trunk, tmp_path, tiny_llama, hidden):
    with (
        serving(trunk, tmp_path) as owner,
        closing(owner.session()) as session,
        raw(owner, tiny_llama, PARTIES[1]) as other,
    ):
        other.opened()
        with owner.busy():
            asking = Asking(session.forward, TrunkRequest(hidden=hidden))
            owner.until(lambda: any(held.under_way for held in owner.server.table))
            owner.stop()
            owner.until(lambda: owner.server.draining)
            other.forward(1, hidden)
            assert other.refused("draining").step == 1
            other.hello(12345)
            other.refused("draining")
            other.hello()
            assert isinstance(other.answer(), Welcome)  # an open session may still ask how things are
            other.send(b"noise")
            other.refused("malformed")
        output, _ = asking.join().result
        assert torch.equal(output, trunk.forward(TrunkRequest(hidden=hidden)))
        assert isinstance(other.answer(), Closed)
        other.greeted.clear()
        session.timeout_s = 1.0
        with pytest.raises(UnreachableError):
            session.forward(TrunkRequest(hidden=hidden))  # it waits for the owner to come back
        owner.join()
    assert owner.budget.used == 0


def test_stopping_twice_does_not_wait(trunk, tmp_path, hidden):
    with serving(trunk, tmp_path) as owner, closing(owner.session(timeout_s=3.0)) as session:
        with owner.busy():
            asking = Asking(session.forward, TrunkRequest(hidden=hidden))
            owner.until(lambda: any(held.under_way for held in owner.server.table))
            owner.stop()
            owner.until(lambda: owner.server.draining)
            assert len(owner.held()) == 1
            owner.stop()
            owner.until(lambda: not owner.server.table)
            assert isinstance(asking.join().error, UnreachableError)
        owner.join()


@pytest.mark.parametrize("when", ["between steps", "in the middle of a step"])
def test_a_rolling_restart_ends_no_training(kit, trunk, undisturbed, tmp_path, when):
    owners = contextlib.ExitStack()
    first = owners.enter_context(serving(trunk, tmp_path))

    def restart():
        first.stop()
        first.join()
        owners.enter_context(serving(trunk, tmp_path, bind=first.address))

    with owners, closing(first.session()) as session:
        model = prepare(kit, session)
        if when == "between steps":
            result = run(model, before_step=lambda step: restart() if step == 2 else None)
        else:
            with first.busy():
                asking = Asking(run, model)
                first.until(lambda: any(held.under_way for held in first.server.table))
                first.stop()
                first.until(lambda: first.server.draining)
            first.join()
            owners.enter_context(serving(trunk, tmp_path, bind=first.address))
            result = asking.join().result
        result.assert_equals(undisturbed)
        assert session.openings >= 1


def test_a_party_without_room_waits_for_it(trunk, tmp_path, hidden):
    with (
        serving(trunk, tmp_path, budget=2_000, recompute=True) as owner,
        closing(owner.session(PARTIES[0])) as one,
        closing(owner.session(PARTIES[1])) as two,
    ):
        expected, step = one.forward(TrunkRequest(hidden=hidden[:, :3], keep=True))
        asking = Asking(two.forward, TrunkRequest(hidden=hidden, keep=True))
        owner.until(lambda: owner.server.counters.refusals.get("busy", 0) >= 2)
        one.backward(step, hidden[:, :3])
        assert torch.equal(asking.join().result[0][:, :3], expected)
        two.timeout_s = 0.4
        with pytest.raises(RefusedError) as refused:
            two.forward(TrunkRequest(hidden=hidden.repeat(4, 1, 1), keep=True))
        assert refused.value.code == "busy"


def test_an_owner_with_nothing_to_do_stops_at_once(trunk, tmp_path):
    with serving(trunk, tmp_path) as owner:
        started = time.monotonic()
        owner.stop()
        owner.join()
        assert time.monotonic() - started < 10


# ---- the log


class Kept(logging.Handler):
    """Every record of the owner's logger, once, whatever other tests did to the loggers above it."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def owner_log():
    log, kept = logging.getLogger("splitfl.owner"), Kept()
    level = log.level
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    yield kept.records
    log.removeHandler(kept)
    log.setLevel(level)


def test_the_log_is_bounded_and_says_what_it_left_out(trunk, tmp_path, tiny_llama, owner_log):
    with serving(trunk, tmp_path) as owner, raw(owner, tiny_llama) as one:
        for _ in range(400):
            one.send(b"noise")
            one.refused("malformed")
        owner.until(lambda: owner.server._lines == 0)
        logged = sum(record.getMessage().startswith("refused: malformed") for record in owner_log)
        left_out = [record.args[0] for record in owner_log if "left out" in record.getMessage()]
        assert logged + sum(left_out) == 400
        assert logged <= 20 * (len(left_out) + 1)
        assert owner.server.counters.refusals == {"malformed": 400}


def test_a_largest_request_is_taken_and_one_beyond_is_not(trunk, tmp_path, tiny_llama):
    with serving(trunk, tmp_path, max_tokens=256) as owner, raw(owner, tiny_llama) as one:
        one.opened()
        one.say(Forward(session=one.number, step=1), hidden=torch.zeros(2, 128, trunk.plan.width))
        assert one.result().shape == (2, 128, trunk.plan.width)
        one.say(Forward(session=one.number, step=2), hidden=torch.zeros(1, 128, trunk.plan.width))
        one.result()
