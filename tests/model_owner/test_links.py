"""A link that breaks: the party asks again with the same bytes, and nothing that is learnt differs."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from splitfl.link import TrunkRequest
from splitfl.wire import frames as wire
from splitfl.wire.messages import Backward, Forward, kind
from tests.model_owner.cutter import cutter
from tests.model_owner.serving import PATIENCE_S, raw, serving
from tests.model_owner.training import train


class Witness:
    """Sees every message of a session."""

    def __init__(self):
        self.sent = {}
        self.times = 0

    def __call__(self, direction, frames):
        if direction != "sent":
            return
        message = wire.open_header(frames, sender="party")
        if isinstance(message, Forward | Backward):
            self.times += 1
            self.sent.setdefault((kind(message), message.step), set()).add(b"".join(map(bytes, frames)))

    def assert_same_bytes(self):
        assert [request for request, versions in self.sent.items() if len(versions) > 1] == []


@pytest.fixture
def hidden(trunk):
    return torch.randn(2, 6, trunk.plan.width, generator=torch.Generator().manual_seed(9))


# Fractions of all that passes in a whole training, up and down.
@pytest.mark.parametrize("way", ["up", "down"])
def test_training_over_a_link_that_breaks_equals_training_undisturbed(kit, trunk, undisturbed, tmp_path, way):
    """Cut within requests, within answers, and between them."""
    with serving(trunk, tmp_path) as owner:
        with cutter(owner.address) as road, closing(owner.session(address=road.address)) as session:
            start = dict(road.passed)
            train(kit, session).assert_equals(undisturbed)
            total = road.passed[way] - start[way]
        witness = Witness()
        with cutter(owner.address) as road, closing(owner.session(address=road.address, tap=witness)) as session:
            start = dict(road.passed)
            road.cuts = [(way, start[way] + round(total * part / 7)) for part in range(1, 7)]
            train(kit, session).assert_equals(undisturbed)
            assert not road.cuts
            assert road.connections == 7
    assert len(witness.sent) == 16
    witness.assert_same_bytes()


@pytest.mark.parametrize("word", ["forward", "backward", "cached forward"])
def test_a_lost_answer_is_sent_again_from_memory(trunk, tmp_path, hidden, word):
    """The owner has computed once, the party has asked twice, with the same bytes."""
    witness = Witness()
    request = TrunkRequest(hidden=hidden, keep=word == "backward", cache=1 if word == "cached forward" else None)
    with (
        serving(trunk, tmp_path) as owner,
        cutter(owner.address) as road,
        closing(owner.session(address=road.address, tap=witness)) as session,
    ):
        held = owner.held()[0]
        step = session.forward(request)[1] if word == "backward" else None
        counters = owner.server.counters
        done = (lambda: counters.backwards) if step else (lambda: counters.forwards)
        before, sent, results = done(), witness.times, []

        def ask():
            results.append(session.backward(step, hidden) if step else session.forward(request)[0])

        road.swallow_down = True
        asking = threading.Thread(target=ask)
        asking.start()
        owner.until(lambda: done() == before + 1 and not held.under_way)
        route = held.routes[-1]
        road.cut()
        asking.join(PATIENCE_S)
        assert not asking.is_alive()
        assert done() == before + 1
        assert held.routes[-1] != route
        assert witness.times == sent + 2
    witness.assert_same_bytes()
    if step:
        _, kept = trunk.forward_kept(TrunkRequest(hidden=hidden), recompute=False)
        assert torch.equal(results[0], trunk.backward(kept, hidden))
    else:
        assert torch.equal(results[0], trunk.forward(TrunkRequest(hidden=hidden)))


def test_an_answer_goes_to_the_link_that_asked_last(trunk, tmp_path, hidden):
    """The link breaks while the request waits: asked again on a new one, it is computed once."""
    results = []
    with (
        serving(trunk, tmp_path) as owner,
        cutter(owner.address) as road,
        closing(owner.session(address=road.address)) as session,
    ):
        held = owner.held()[0]
        with owner.busy():
            asking = threading.Thread(target=lambda: results.append(session.forward(TrunkRequest(hidden=hidden))))
            asking.start()
            owner.until(lambda: bool(held.under_way))
            route = held.routes[-1]
            road.cut()
            owner.until(lambda: held.routes[-1] != route)
        asking.join(PATIENCE_S)
        assert not asking.is_alive()
        assert owner.server.counters.forwards == 1
    assert torch.equal(results[0][0], trunk.forward(TrunkRequest(hidden=hidden)))


def test_an_owner_that_starts_again_finds_training_going_on(kit, trunk, undisturbed, tmp_path):
    """It has forgotten every session; nobody at the party notices. The address stays, as behind a name."""
    witness = Witness()
    with cutter("tcp://127.0.0.1:1") as road, serving(trunk, tmp_path) as first:
        road.target = ("127.0.0.1", int(first.address.rsplit(":", 1)[1]))
        session = first.session(address=road.address, tap=witness)
        second = serving(trunk, tmp_path)

        def change_owners(step):
            if step == 2:
                owner = second.__enter__()
                road.target = ("127.0.0.1", int(owner.address.rsplit(":", 1)[1]))
                road.cut()

        try:
            with closing(session):
                train(kit, session, before_step=change_owners).assert_equals(undisturbed)
        finally:
            second.__exit__(None, None, None)
        assert first.server.counters.backwards == 4
    witness.assert_same_bytes()


def test_an_owner_that_forgets_between_forward_and_backward(trunk, tmp_path, hidden):
    """The party says hello, sends the forward's bytes again, then the backward's."""
    witness = Witness()
    with serving(trunk, tmp_path) as owner, closing(owner.session(tap=witness)) as session:
        output, step = session.forward(TrunkRequest(hidden=hidden, keep=True))
        owner.do(lambda: [owner.server._end(held) for held in owner.server.table])
        session.release(caches=(1, 2, 3))  # goes out first, and is refused as well
        result = session.backward(step, hidden)
        session.release(caches=(1, 2, 3))
        owner.do(lambda: [owner.server._end(held) for held in owner.server.table])
        assert torch.equal(session.forward(TrunkRequest(hidden=hidden))[0], output)
    _, kept = trunk.forward_kept(TrunkRequest(hidden=hidden), recompute=False)
    assert torch.equal(result, trunk.backward(kept, hidden))
    witness.assert_same_bytes()


def test_an_answer_finds_the_link_that_lives(trunk, tmp_path, tiny_llama, hidden):
    """What was sent on a link that broke may be read after the same request on the next one; it must not win."""
    with serving(trunk, tmp_path) as owner, raw(owner, tiny_llama) as new:
        new.opened()
        with raw(owner, tiny_llama) as old, owner.busy():
            old.number = new.number
            held = owner.held()[0]
            new.forward(1, hidden, keep=True)
            owner.until(lambda: bool(held.under_way))
            living = held.routes[-1]
            old.forward(1, hidden, keep=True)
            owner.until(lambda: held.routes[-1] != living)
            old.link.close(0)
            owner.until(lambda: not owner.server.socket.send(held.routes[-1], [b"anybody there?"]))
        assert torch.equal(new.result(), trunk.forward(TrunkRequest(hidden=hidden)))
