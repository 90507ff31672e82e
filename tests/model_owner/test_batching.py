"""Passes that several sessions share: when, and that each gets its own answer whatever befalls the others."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from model_owner import batching
from model_owner.batching import Batcher, Judge, Pending, allowed
from model_owner.observer import NoObserver
from model_owner.scheduler import Joint, Lane, Scheduler
from splitfl.errors import RefusedError
from splitfl.link import TrunkRequest
from tests.live.owner import PARTIES
from tests.model_owner.serving import PATIENCE_S, serving


class Passes(NoObserver):
    """Notes how many requests shared each pass."""

    def __init__(self):
        self.shared = []

    def batch_done(self, requests, rows, tokens):
        self.shared.append((requests, rows, tokens))


@pytest.fixture
def owner(trunk, tmp_path):
    with serving(trunk, tmp_path, max_sessions_per_party=8) as one:
        one.passes = Passes()
        one.server.batcher = Batcher(one.answerer, "on", one.passes, always=True)
        yield one


def together(owner, asks):
    """The results of `asks`, or what they raised, all in the queue before the first is computed."""

    def attempt(ask):
        try:
            return ask()
        except RefusedError as error:
            return error

    with ThreadPoolExecutor(len(asks)) as pool:
        with owner.busy():
            futures = [pool.submit(attempt, ask) for ask in asks]
            owner.until(lambda: owner.server.scheduler.waiting == len(asks))
        return [future.result(PATIENCE_S) for future in futures]


def sessions_of(owner, count, stack, **options):
    return [stack.enter_context(owner.session(PARTIES[index % 2], **options)) for index in range(count)]


def near(found, expected):
    return torch.allclose(found, expected, rtol=0, atol=float(2e-6 * expected.abs().max()))


@pytest.fixture
def stack():
    from contextlib import ExitStack

    with ExitStack() as one:
        yield one


def states(trunk, lengths):
    torch.manual_seed(7)
    return [torch.randn(1, length, trunk.plan.width) for length in lengths]


def test_forwards_of_several_parties_share_a_pass(owner, trunk, stack):
    hidden = states(trunk, [8, 6, 7, 8])
    sessions = sessions_of(owner, 4, stack)
    asks = [
        lambda one=one, h=h: one.forward(TrunkRequest(hidden=h))[0] for one, h in zip(sessions, hidden, strict=True)
    ]
    for found, h in zip(together(owner, asks), hidden, strict=True):
        assert near(found, trunk.forward(TrunkRequest(hidden=h)))
    assert owner.passes.shared == [(4, 4, 29)]


def test_recomputed_backwards_share_a_pass(owner, trunk, stack):
    hidden = states(trunk, [8, 6, 8])
    sessions = sessions_of(owner, 3, stack, memory="recompute")
    steps = [one.forward(TrunkRequest(hidden=h, keep=True))[1] for one, h in zip(sessions, hidden, strict=True)]
    asks = [lambda a=a: a[0].backward(a[1], a[2]) for a in zip(sessions, steps, hidden, strict=True)]
    for found, h in zip(together(owner, asks), hidden, strict=True):
        _, kept = trunk.forward_kept(TrunkRequest(hidden=h), recompute=True)
        assert near(found, trunk.backward(kept, h))
    assert owner.passes.shared == [(3, 3, 22)]
    assert owner.budget.used == 0


def test_graphs_that_are_kept_are_never_shared(owner, trunk, stack):
    hidden = states(trunk, [8, 8])
    sessions = sessions_of(owner, 2, stack)
    asks = [
        lambda a=a: a[0].forward(TrunkRequest(hidden=a[1], keep=True))[0] for a in zip(sessions, hidden, strict=True)
    ]
    for found, h in zip(together(owner, asks), hidden, strict=True):
        assert torch.equal(found, trunk.forward(TrunkRequest(hidden=h)))
    assert owner.passes.shared == []


def decoding(owner, trunk, sessions, lengths):
    """Filled caches; the next state of each session, and what it gets alone."""
    prompts, nexts = states(trunk, lengths), states(trunk, [1] * len(lengths))
    for one, prompt in zip(sessions, prompts, strict=True):
        one.forward(TrunkRequest(hidden=prompt, cache=1))
    expected = [
        trunk.forward(TrunkRequest(hidden=torch.cat(pair, 1)))[:, -1:] for pair in zip(prompts, nexts, strict=True)
    ]
    return nexts, expected


def decode(sessions, nexts, lengths):
    return [
        lambda one=one, h=h, past=past: one.forward(TrunkRequest(hidden=h, cache=1, past=past))[0]
        for one, h, past in zip(sessions, nexts, lengths, strict=True)
    ]


def test_decoding_shares_a_pass_and_goes_on_alone(owner, trunk, stack):
    lengths = [9, 4, 6]
    sessions = sessions_of(owner, 3, stack)
    nexts, expected = decoding(owner, trunk, sessions, lengths)
    for found, alone in zip(together(owner, decode(sessions, nexts, lengths)), expected, strict=True):
        assert near(found, alone)
    assert owner.passes.shared == [(3, 3, 3)]
    again = decode(sessions, nexts, lengths)[0]()  # takes the last position back, and says it again
    assert near(again, expected[0])


def test_one_partys_nan_never_enters_a_pass(owner, trunk, stack):
    lengths = [9, 4, 6]
    sessions = sessions_of(owner, 3, stack)
    nexts, expected = decoding(owner, trunk, sessions, lengths)
    nexts[1][0, 0, 3] = torch.nan
    found = together(owner, decode(sessions, nexts, lengths))
    assert found[1].code == "not_finite"
    assert near(found[0], expected[0])
    assert near(found[2], expected[2])
    assert owner.passes.shared == [(2, 2, 2)]


def test_what_a_pass_makes_infinite_is_done_again_alone(owner, trunk, stack, monkeypatch):
    """Rows are judged one by one: the others have their answer from the pass, and this one from a pass of its own."""
    lengths = [9, 4, 6]
    sessions = sessions_of(owner, 3, stack)
    nexts, expected = decoding(owner, trunk, sessions, lengths)
    whole = batching.decode_together

    def overflows(*arguments):
        outputs = whole(*arguments)
        found = next(n for n, request in enumerate(arguments[1]) if request.past == lengths[1])
        return [output * torch.inf if n == found else output for n, output in enumerate(outputs)]

    monkeypatch.setattr(batching, "decode_together", overflows)
    for found, alone in zip(together(owner, decode(sessions, nexts, lengths)), expected, strict=True):
        assert near(found, alone)
    assert owner.passes.shared == [(3, 3, 3)]


def test_a_pass_that_fails_is_done_again_one_by_one(owner, trunk, stack, monkeypatch):
    lengths = [9, 4, 6]
    sessions = sessions_of(owner, 3, stack)
    nexts, expected = decoding(owner, trunk, sessions, lengths)
    whole = batching.decode_together

    def fails_late(*arguments):
        whole(*arguments)  # caches are written already
        raise RuntimeError("out of luck")

    said = []
    monkeypatch.setattr(batching, "decode_together", fails_late)
    monkeypatch.setattr(batching.log, "warning", lambda text, *facts, **_: said.append(text % facts))
    for found, alone in zip(together(owner, decode(sessions, nexts, lengths)), expected, strict=True):
        assert near(found, alone)
    assert "one by one" in said[0]
    assert owner.passes.shared == []


def test_a_session_that_ends_leaves_the_pass_to_the_others(owner, trunk, stack):
    lengths = [9, 4]
    sessions = sessions_of(owner, 2, stack)
    nexts, expected = decoding(owner, trunk, sessions, lengths)
    gone, stays = sessions
    answer = []
    asker = threading.Thread(target=lambda: answer.append(decode([stays], nexts[1:], lengths[1:])[0]()))
    with owner.busy():
        message = batching.Forward(session=gone.terms.session, step=99, cache=1, past=9)
        gone._ask(message, {"hidden": nexts[0]})
        asker.start()
        owner.until(lambda: owner.server.scheduler.waiting == 2)
        gone.close()
    asker.join(PATIENCE_S)
    assert near(answer[0], expected[1])


# ---- whether it pays


def pending(kind="decode", rows=1, length=1, past=40):
    return Pending(kind=kind, held=SimpleNamespace(), message=None, rows=rows, length=length, past=past,
                   prepare=None, alone=None)  # fmt: skip


def served(judge, together_s, alone_s, passes, count=4):
    """Passes that were shared, of so many; with these times for `count` requests together, and for one alone."""
    items, shared = [pending() for _ in range(count)], 0
    for _ in range(passes):
        if judge.pays(items):
            shared += 1
            judge.took(items, together_s)
        else:
            for item in items:
                judge.took([item], alone_s)
    return shared


def test_what_gains_is_shared_and_what_loses_is_left_alone():
    assert served(Judge(), 1.5, 1.0, 1000) > 980
    shared = served(Judge(), 4.8, 1.0, 5000)
    assert 2 <= shared < 20
    # What trying has cost, beside serving all alone: far below three per cent.
    assert (shared * 4.8 + (5000 - shared) * 4.0) / (5000 * 4.0) < 1.003


def test_a_judgement_follows_the_machine():
    judge = Judge()
    served(judge, 4.8, 1.0, 300)
    assert served(judge, 1.0, 1.0, 3000) > 2000
    assert served(judge, 6.0, 1.0, 1000) < 30


def test_what_takes_long_alone_is_not_even_tried():
    judge = Judge()
    items = [pending("backward", 8, 128), pending("backward", 8, 128)]
    judge.took(items[:1], 0.3)
    assert not any(judge.pays(items) for _ in range(1000))


def test_what_is_unknown_alone_is_not_shared_first():
    judge = Judge()
    items = [pending(), pending()]
    assert not judge.pays(items)
    judge.took(items[:1], 1.0)
    assert judge.pays(items)


def test_a_decode_waits_only_for_who_has_come_before(owner):
    """Of two that decode at different times, one does not hold the other up for long: the waits bring nobody."""
    batcher = Batcher(owner.answerer, "on")
    items = [pending(), pending()]
    waits = 0
    for number in range(640):
        one = pending()
        one.held = items[number % 2].held
        batcher.joint(one)
        waits += batcher.window_s(one, 0) > 0
        assert batcher.choose(one, []) == []
    assert 1 <= waits <= 16
    assert batcher.window_s(pending(), 1) == 0  # all are there
    for _ in range(100):  # and now they come together
        batcher.judge.alone[batching._alone_key(items[0])] = 1.0
        one = pending()
        one.waited = True
        batcher.choose(one, [pending()])
    assert batcher.window_s(pending(), 0) == batching.WINDOW_S


async def test_who_stands_in_a_window_keeps_nobody_waiting():
    """Two workers: one waits for company, and work that comes meanwhile goes to the other."""

    class Patient:
        def window_s(self, item, waiting):
            return 0.3

        def choose(self, item, others):
            return []

        def run(self, items):
            raise AssertionError

        def took(self, items, seconds):
            pass

    scheduler = Scheduler(workers=2)
    try:
        joint = Joint(key=1, item=None, together=Patient())
        first = asyncio.ensure_future(scheduler.run("a", 1, lambda: 1, lane=Lane.DECODE, joint=joint))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(scheduler.run("b", 1, lambda: 2)) for _ in range(4)]
        assert await asyncio.wait_for(asyncio.gather(first, *others), PATIENCE_S) == [1, 2, 2, 2, 2]
    finally:
        scheduler.stop(PATIENCE_S)


def test_bounds_of_a_pass():
    assert batching._fits([pending("forward", 1, 100), pending("forward", 1, 90)])
    assert not batching._fits([pending("forward", 1, 100), pending("forward", 8, 10)])
    assert not batching._fits([pending("forward", 40, 100), pending("forward", 40, 100)])
    assert not batching._fits([pending(rows=40), pending(rows=40)])
    assert batching._fits([pending(past=10), pending(past=60)])


def test_what_a_setting_allows(trunk):
    assert allowed(trunk, "off") == frozenset()
    assert allowed(trunk, "on") == {"forward", "backward", "decode"}
    equal = allowed(trunk, "exact")
    assert allowed(trunk, "auto") == equal | {"decode"}


def test_without_batching_nothing_is_shared(trunk, tmp_path, stack):
    with serving(trunk, tmp_path) as owner:
        passes = Passes()
        owner.server.batcher = Batcher(owner.answerer, "off", passes, always=True)
        with owner.session() as one, owner.session(PARTIES[1]) as two:
            hidden = states(trunk, [8, 8])
            asks = [
                lambda a=a: a[0].forward(TrunkRequest(hidden=a[1]))[0] for a in zip((one, two), hidden, strict=True)
            ]
            for found, h in zip(together(owner, asks), hidden, strict=True):
                assert torch.equal(found, trunk.forward(TrunkRequest(hidden=h)))
        assert passes.shared == []
