"""Who goes before whom at the workers: weights, lanes, and that nobody starves."""

from __future__ import annotations

import asyncio
import time

import pytest

from model_owner.refusals import Refusal
from model_owner.scheduler import Lane, Scheduler
from tests.model_owner.test_scheduler import LIMIT_S, held_up


@pytest.fixture
def scheduler():
    made = Scheduler(workers=1)
    yield made
    made.stop(LIMIT_S)


async def queued(scheduler, jobs):
    """The order in which `jobs`, (name, party, tokens, options) each, are done by one worker."""
    order = []
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    tasks = []
    for name, party, tokens, options in jobs:
        work = lambda name=name: order.append(name)  # noqa: E731
        tasks.append(asyncio.ensure_future(scheduler.run(party, tokens, work, **options)))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.wait_for(asyncio.gather(holder, *tasks), LIMIT_S)
    return order


@pytest.mark.parametrize("weight", [2.0, 4.0])
async def test_tokens_are_served_by_weight(scheduler, weight):
    jobs = [("heavy", "h", 100, {"weight": weight}) for _ in range(60)] + [("light", "l", 100, {}) for _ in range(60)]
    order = await queued(scheduler, jobs)
    first = order[:40]
    share = first.count("heavy") / len(first)
    assert abs(share - weight / (weight + 1)) < 0.06


async def test_ten_sessions_of_a_party_have_one_share(scheduler):
    """The account is the party's; ten of its sessions wait with three requests each, the other party with one."""
    jobs = [("many", "many", 100, {}) for _ in range(30)] + [("one", "one", 100, {}) for _ in range(30)]
    order = await queued(scheduler, jobs)
    assert abs(order[:30].count("many") - 15) <= 1


async def test_decoding_goes_before_prefill_and_prefill_before_training(scheduler):
    lanes = [Lane.TRAINING, Lane.PREFILL, Lane.DECODE] * 5
    order = await queued(scheduler, [(lane, f"{lane} party", 1, {"lane": lane}) for lane in lanes])
    # What waited behind decoding earns turns by time; with work that takes none, few of them.
    assert [lane for lane in order if lane is Lane.DECODE] == [Lane.DECODE] * 5
    assert order[0] is Lane.DECODE
    assert sum(order.index(lane) for lane in Lane) <= 6


async def test_training_gets_a_quarter_of_the_time_however_much_is_decoded(scheduler):
    """Eight parties decode without a pause; one trains. Seconds of work are counted, of each kind."""
    spent = {Lane.DECODE: 0.0, Lane.TRAINING: 0.0}
    longest = {Lane.DECODE: 0.0, Lane.TRAINING: 0.0}
    until = time.monotonic() + 1.5

    def work(lane, seconds):
        begun = time.monotonic()
        time.sleep(seconds)
        spent[lane] += time.monotonic() - begun

    async def party(name, lane, seconds):
        while time.monotonic() < until:
            asked = time.monotonic()
            await scheduler.run(name, 1, lambda: work(lane, seconds), lane=lane)
            longest[lane] = max(longest[lane], time.monotonic() - asked)

    decoding = [party(f"d{number}", Lane.DECODE, 0.002) for number in range(8)]
    await asyncio.wait_for(asyncio.gather(party("t", Lane.TRAINING, 0.02), *decoding), LIMIT_S)
    share = spent[Lane.TRAINING] / sum(spent.values())
    assert 0.18 < share < 0.32
    assert longest[Lane.TRAINING] < 0.5


async def test_training_alone_has_all_the_time_and_no_debt(scheduler):
    for _ in range(20):
        await scheduler.run("t", 100, lambda: time.sleep(0.001), lane=Lane.TRAINING)
    assert scheduler._earned[Lane.TRAINING] == 0


async def test_what_nobody_wants_any_more_is_not_computed(scheduler):
    done, wanted = [], {"a": True, "b": True}
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    tasks = {
        name: asyncio.ensure_future(
            scheduler.run(name, 1, lambda name=name: done.append(name), wanted=lambda name=name: wanted[name])
        )
        for name in wanted
    }
    await asyncio.sleep(0)
    wanted["a"] = False
    gate.set()
    await asyncio.wait_for(asyncio.gather(holder, tasks["b"]), LIMIT_S)
    with pytest.raises(Refusal) as dropped:
        await asyncio.wait_for(tasks["a"], LIMIT_S)
    assert (done, dropped.value.code) == (["b"], "busy")
