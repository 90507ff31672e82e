"""Micro-batches over real sockets: several requests under way, an owner that is exchanged, a link that breaks."""

from __future__ import annotations

import functools
from contextlib import closing

import pytest
import torch

from model_owner.memory import Costs
from model_owner.trunk import LocalLink
from party.pipeline import run_pipelined, split_batch
from splitfl.errors import ResourceError
from splitfl.link import TrunkRequest
from splitfl.wire import frames as wire
from splitfl.wire.messages import Backward, BackwardDone, Forward, ForwardDone, kind
from tests.model_owner.cutter import cutter
from tests.model_owner.serving import serving
from tests.model_owner.training import STEPS, Trained, prepare

PARTS = 3


class Tap:
    """Sees every message; keeps the order of requests and answers, and each request's bytes."""

    def __init__(self):
        self.order, self.bytes, self.open, self.most = [], {}, set(), 0
        self.on_sent = lambda word, step: None

    def __call__(self, direction, frames):
        message = wire.open_header(frames, sender="party" if direction == "sent" else "owner")
        if isinstance(message, Forward | Backward):
            self.order.append((kind(message), message.step))
            self.bytes.setdefault((kind(message), message.step), set()).add(b"".join(map(bytes, frames)))
            self.open.add(message.step)
            self.most = max(self.most, len(self.open))
            self.on_sent(kind(message), message.step)
        elif isinstance(message, ForwardDone | BackwardDone):
            self.order.append((kind(message), message.step))
            if isinstance(message, BackwardDone):
                self.open.discard(message.step)

    def assert_same_bytes(self):
        assert [request for request, versions in self.bytes.items() if len(versions) > 1] == []


def share(model, part, total):
    count = int(part["labels"][:, 1:].ne(-100).sum())
    loss = model(**part).loss * (count / total)
    loss.backward()
    return float(loss.detach())


def train(kit, link, *, window=PARTS, before_step=lambda step: None):
    """Some steps of AdamW, each batch in `PARTS` micro-batches."""
    model = prepare(kit, link)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, losses = torch.Generator().manual_seed(2), []
    for step in range(STEPS):
        before_step(step)
        tokens = torch.randint(3, 60, (5, 9), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, 5:], mask[3, 7:] = 0, 0
        labels = tokens.masked_fill(mask == 0, -100)
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        total = int(labels[:, 1:].ne(-100).sum())
        parts = split_batch(batch, PARTS).parts
        losses += run_pipelined([functools.partial(share, model, part, total) for part in parts], window=window)
        optimizer.step()
        optimizer.zero_grad()
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return Trained(losses=losses, adapter=adapter)


@pytest.fixture(scope="module")
def calm(kit, trunk):
    """The training through a link that crosses no wire."""
    return train(kit, LocalLink(trunk))


def test_requests_go_out_before_earlier_answers_are_read(kit, trunk, calm, tmp_path):
    tap = Tap()
    with serving(trunk, tmp_path) as owner, closing(owner.session(tap=tap)) as session:
        train(kit, session).assert_equals(calm)
    asked = [request for request in tap.order if not request[0].endswith("_done")]
    steps = range(1, PARTS + 1)
    assert asked[: 2 * PARTS] == [*(("forward", step) for step in steps), *(("backward", step) for step in steps)]
    assert tap.most == PARTS


@pytest.mark.parametrize("window", [1, 2])
def test_no_more_is_under_way_than_the_window(kit, trunk, tmp_path, window):
    tap = Tap()
    with serving(trunk, tmp_path) as owner, closing(owner.session(tap=tap)) as session:
        train(kit, session, window=window).assert_equals(train(kit, LocalLink(trunk), window=window))
    assert tap.most == window


@pytest.mark.parametrize(("word", "number"), [("forward", 3), ("backward", 2)])
def test_an_owner_that_starts_again_with_several_steps_in_flight(kit, trunk, calm, tmp_path, word, number):
    """It has forgotten the session, the steps it kept and what was asked; the party asks again, with the same bytes."""
    tap = Tap()
    with cutter("tcp://127.0.0.1:1") as road, serving(trunk, tmp_path) as first:
        road.target = ("127.0.0.1", int(first.address.rsplit(":", 1)[1]))
        second = serving(trunk, tmp_path)
        moved = []

        def change_owners(sent, step):
            if sent == word and step == PARTS + number and not moved:  # in the second batch
                moved.append(second.__enter__())
                road.target = ("127.0.0.1", int(moved[0].address.rsplit(":", 1)[1]))
                road.cut()

        tap.on_sent = change_owners
        try:
            with closing(first.session(address=road.address, tap=tap)) as session:
                train(kit, session).assert_equals(calm)
                assert session.openings == 1
        finally:
            if moved:
                second.__exit__(None, None, None)
        assert moved
    tap.assert_same_bytes()


def test_an_owner_that_forgets_everything_between_any_two_messages(kit, trunk, calm, tmp_path):
    """The session ends at the owner again and again, with requests under way and answers on their way."""
    tap, count = Tap(), [0]
    with serving(trunk, tmp_path) as owner, closing(owner.session(tap=tap)) as session:

        def forget(_word, _step):
            count[0] += 1
            if count[0] % 7 == 3:
                owner.do(lambda: [owner.server._end(held) for held in owner.server.table])

        tap.on_sent = forget
        train(kit, session).assert_equals(calm)
        assert session.openings >= 3
    tap.assert_same_bytes()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_link_that_breaks_with_several_steps_in_flight(kit, trunk, calm, tmp_path, way):
    tap = Tap()
    with serving(trunk, tmp_path) as owner:
        with cutter(owner.address) as road, closing(owner.session(address=road.address)) as session:
            start = dict(road.passed)
            train(kit, session).assert_equals(calm)
            total = road.passed[way] - start[way]
        with cutter(owner.address) as road, closing(owner.session(address=road.address, tap=tap)) as session:
            start = dict(road.passed)
            road.cuts = [(way, start[way] + round(total * part / 7)) for part in range(1, 7)]
            train(kit, session).assert_equals(calm)
            assert not road.cuts
    tap.assert_same_bytes()


def test_an_owner_with_room_for_one_step_at_a_time_is_waited_for(kit, trunk, calm, tmp_path):
    """It falls back to the input alone, and says busy where there is no room for that either."""
    costs = Costs(graph=10**9, cache=0)
    room = 5 * 9 * trunk.plan.width * 4  # of which a party may hold 80%: the largest micro-batch and one more, not all
    with serving(trunk, tmp_path, budget=room, costs=costs) as owner, closing(owner.session()) as session:
        train(kit, session).assert_equals(calm)
        assert owner.server.counters.refusals["busy"]


def test_a_step_that_fails_in_the_middle_leaves_a_session_that_goes_on(kit, trunk, tmp_path):
    with serving(trunk, tmp_path) as owner, closing(owner.session()) as session:
        hidden = torch.randn(1, 6, trunk.plan.width)

        def asks():
            return session.forward(TrunkRequest(hidden=hidden, keep=True, overlap=True))

        def too_large():
            session.forward(TrunkRequest(hidden=torch.zeros(1, 9999, trunk.plan.width)))

        with pytest.raises(ResourceError):
            run_pipelined([asks, too_large])
        assert not session._under_way
        output, _ = session.forward(TrunkRequest(hidden=hidden))
    assert torch.equal(output, trunk.forward(TrunkRequest(hidden=hidden)))
