"""The queue in front of the workers."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
import torch

from model_owner.scheduler import Scheduler
from splitfl.errors import InternalError

LIMIT_S = 30.0


@pytest.fixture
def scheduler():
    made = Scheduler(workers=1)
    yield made
    made.stop(LIMIT_S)


def held_up(scheduler):
    """A job that occupies the one worker until the returned event is set."""
    begun, gate = threading.Event(), threading.Event()

    def hold():
        begun.set()
        assert gate.wait(LIMIT_S)

    task = asyncio.ensure_future(scheduler.run("holder", 0, hold))
    return task, begun, gate


async def queued(scheduler, jobs):
    """The order in which `jobs`, (session, tokens) each, are done when all of them wait for one worker."""
    order = []
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    tasks = []
    for session, tokens in jobs:
        tasks.append(asyncio.ensure_future(scheduler.run(session, tokens, lambda name=session: order.append(name))))
        await asyncio.sleep(0)  # the task has put its job in the queue
    assert scheduler.waiting == len(jobs)
    gate.set()
    await asyncio.wait_for(asyncio.gather(holder, *tasks), LIMIT_S)
    return order


async def test_a_result_comes_back(scheduler):
    assert await asyncio.wait_for(scheduler.run("a", 1, lambda: threading.current_thread().name), LIMIT_S) == (
        "trunk-worker-0"
    )


async def test_a_light_session_overtakes_a_heavy_one(scheduler):
    """Ten jobs of 1000 tokens are there first; ten of 10 tokens have all been done after the second of them."""
    order = await queued(scheduler, [("heavy", 1000)] * 10 + [("light", 10)] * 10)
    assert order[:12].count("light") == 10
    assert order[0] == "heavy"


async def test_equal_sessions_take_turns(scheduler):
    order = await queued(scheduler, [("a", 100)] * 6 + [("b", 100)] * 6 + [("c", 100)] * 6)
    for end in range(3, 18, 3):
        counts = [order[:end].count(name) for name in "abc"]
        assert max(counts) - min(counts) <= 1


async def test_the_share_of_tokens_is_equal_not_that_of_requests(scheduler):
    order = await queued(scheduler, [("large", 400)] * 10 + [("small", 100)] * 40)
    first_half = order[:25]
    tokens = {"large": 400 * first_half.count("large"), "small": 100 * first_half.count("small")}
    assert abs(tokens["large"] - tokens["small"]) <= 400


async def test_who_was_idle_has_saved_nothing_up(scheduler):
    """A session that comes late takes turns from now on; it does not get all that it has not used."""
    await queued(scheduler, [("busy", 100)] * 50)
    order = await queued(scheduler, [("busy", 100)] * 10 + [("late", 100)] * 10)
    assert order[:10].count("late") <= 6


async def test_one_sessions_jobs_keep_their_order(scheduler):
    order = []
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    tasks = []
    for number in range(20):
        tasks.append(asyncio.ensure_future(scheduler.run("a", number % 3, lambda n=number: order.append(n))))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.wait_for(asyncio.gather(holder, *tasks), LIMIT_S)
    assert order == list(range(20))


async def test_a_problem_goes_to_who_asked_and_the_worker_lives(scheduler):
    for problem in (ValueError("no"), KeyError("no"), MemoryError(), TimeoutError()):

        def fail(problem=problem):
            raise problem

        with pytest.raises(type(problem)):
            await asyncio.wait_for(scheduler.run("a", 1, fail), LIMIT_S)
    assert await asyncio.wait_for(scheduler.run("a", 1, lambda: 7), LIMIT_S) == 7


@pytest.mark.parametrize("problem", [StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_what_would_end_the_loop_becomes_an_ordinary_error(scheduler, problem):
    def fail():
        raise problem

    with pytest.raises(InternalError, match=problem.__name__):
        await asyncio.wait_for(scheduler.run("a", 1, fail), LIMIT_S)
    assert await asyncio.wait_for(scheduler.run("a", 1, lambda: 7), LIMIT_S) == 7


async def test_who_stops_waiting_disturbs_nobody(scheduler):
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    waiting = asyncio.ensure_future(scheduler.run("a", 1, lambda: 7))
    await asyncio.sleep(0)
    waiting.cancel()
    gate.set()
    await asyncio.wait_for(holder, LIMIT_S)
    assert await asyncio.wait_for(scheduler.run("b", 1, lambda: 8), LIMIT_S) == 8


async def test_as_many_jobs_at_once_as_workers():
    scheduler = Scheduler(workers=3, threads=1)
    together = threading.Barrier(3)
    try:
        jobs = [scheduler.run(name, 1, lambda: together.wait(LIMIT_S)) for name in "abc"]
        assert sorted(await asyncio.wait_for(asyncio.gather(*jobs), LIMIT_S)) == [0, 1, 2]
    finally:
        scheduler.stop(LIMIT_S)


async def test_many_workers_do_every_job_once():
    scheduler = Scheduler(workers=4)
    lock, done = threading.Lock(), []

    def note(number):
        with lock:
            done.append(number)
        return number

    try:
        jobs = [scheduler.run(n % 7, n % 5, lambda n=n: note(n)) for n in range(500)]
        assert await asyncio.wait_for(asyncio.gather(*jobs), LIMIT_S) == list(range(500))
        assert sorted(done) == list(range(500))
    finally:
        scheduler.stop(LIMIT_S)


async def test_stopping_finishes_what_is_under_way_and_cancels_what_waits():
    scheduler = Scheduler(workers=1)
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    waiting = [asyncio.ensure_future(scheduler.run("a", 1, lambda: 7)) for _ in range(3)]
    await asyncio.sleep(0)
    stopping = asyncio.ensure_future(asyncio.to_thread(scheduler.stop, LIMIT_S))
    for task in waiting:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, LIMIT_S)
    gate.set()
    await asyncio.wait_for(asyncio.gather(holder, stopping), LIMIT_S)
    with pytest.raises(InternalError):
        await scheduler.run("a", 1, lambda: 7)


async def test_stopping_does_not_wait_for_ever():
    scheduler = Scheduler(workers=2)
    holder, begun, gate = held_up(scheduler)
    await asyncio.to_thread(begun.wait, LIMIT_S)
    await asyncio.wait_for(asyncio.to_thread(scheduler.stop, 0.05), LIMIT_S)
    gate.set()
    await asyncio.wait_for(holder, LIMIT_S)
    for worker in scheduler._workers:
        worker.join(LIMIT_S)
        assert not worker.is_alive()


async def test_accounts_that_owe_nothing_are_forgotten(scheduler):
    for number in range(2500):
        await asyncio.wait_for(scheduler.run(number, 10, lambda: None), LIMIT_S)
        assert len(scheduler._served) <= 1025


@pytest.mark.parametrize("fails", [False, True])
async def test_a_jobs_tensors_are_gone_when_it_is_done(scheduler, fails):
    """Without the help of a garbage collection, which may come much later."""
    gc.collect()
    gc.disable()
    try:
        tensor = torch.zeros(1000)
        watched = weakref.ref(tensor)

        def work(tensor):
            if fails:
                raise ValueError("no")
            return float(tensor.sum())

        job = scheduler.run("a", 1, lambda held=tensor: work(held))
        del tensor
        try:
            async with asyncio.timeout(LIMIT_S):
                await job
        except ValueError:
            assert fails
        del job
        # The worker lets go of a job just after it has told of its end.
        await asyncio.wait_for(scheduler.run("a", 1, lambda: None), LIMIT_S)
        assert watched() is None
    finally:
        gc.enable()
