"""Step 9 of the journey: a fair queue in tokens, and the workers that own the device.

The thread that owns the sockets never computes; workers never touch a socket. Work waits in three lanes: decoding goes
before prefill, prefill before training. Within a lane it is ordered by the tokens that its party has been served so
far, divided by the party's weight: a party with large batches, or with ten sessions, cannot starve another one.

No lane starves. While work waits behind a higher lane it earns a third of the time that workers spend there, and goes
first as soon as it has earned something; what it then takes is paid off before it may do so again. So a lane that has
work gets at least a quarter of the workers' time: once its last piece of work took x seconds, the next one begins
after at most 3x seconds and what is under way then.

Work that nobody waits for any more is dropped before it is computed. Several one-thread workers serve several parties
better than one worker with several threads (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import torch

from model_owner.observer import NoObserver, Observer
from model_owner.refusals import given_up
from splitfl.errors import InternalError

T = TypeVar("T")
_ACCOUNTS = 1024  # of parties that may have stopped asking
SHARE_OF_LOWER = 1 / 3
"""Seconds that waiting work earns for each second that a higher lane takes: a quarter of the time in all."""


class Lane(IntEnum):
    """What goes before what."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


class Together(Protocol):
    """Computes several pieces of work of one kind in one pass. Called from workers."""

    def window_s(self, item: Any, waiting: int) -> float:
        """How long to wait for others like `item`, of which `waiting` are there already; mostly 0."""

    def choose(self, item: Any, others: list[Any]) -> list[int]:
        """Which of `others`, perhaps none, to compute together with `item`; asked once for each `item`."""

    def run(self, items: list[Any]) -> list[Any]:
        """The result of each, or the exception that it met."""

    def took(self, items: list[Any], seconds: float) -> None:
        """So long did it take, for one item or for several."""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Work that may be done together with other work of the same key."""

    key: Hashable
    item: Any
    together: Together


@dataclass(order=True)
class _Job:
    virtual_start: float
    number: int
    work: Callable[[], Any] = field(compare=False)
    done: asyncio.Future[Any] = field(compare=False)
    loop: asyncio.AbstractEventLoop = field(compare=False)
    lane: Lane = field(compare=False)
    wanted: Callable[[], bool] = field(compare=False)
    joint: Joint | None = field(compare=False)
    came: float = field(default_factory=time.monotonic, compare=False)


class Scheduler:
    """Weighted start-time fair queueing in three lanes, in front of a fixed number of worker threads.

    Args:
        workers: threads that compute at the same time.
        threads: torch's threads within each worker; None leaves torch's choice.
        observer: is told of each piece of work.
    """

    def __init__(self, workers: int = 1, threads: int | None = None, observer: Observer | None = None) -> None:
        self._observer: Observer = observer or NoObserver()
        self._threads_each = threads
        self._lanes: dict[Lane, list[_Job]] = {lane: [] for lane in Lane}
        self._earned = dict.fromkeys(Lane, 0.0)
        self._ready = threading.Condition()
        self._numbers = itertools.count()
        self._served: dict[Hashable, float] = {}
        self._now = 0.0
        self._stopping = False
        self._workers = [
            threading.Thread(target=self._work, name=f"trunk-worker-{index}", daemon=True) for index in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """Jobs that no worker has taken yet."""
        return sum(map(len, self._lanes.values()))

    async def run(
        self, party: Hashable, tokens: float, work: Callable[[], T], *, lane: Lane = Lane.TRAINING,
        weight: float = 1.0, wanted: Callable[[], bool] = lambda: True, joint: Joint | None = None,
    ) -> T:  # fmt: skip
        """Do `work` on a worker, in this party's turn.

        Args:
            party: whose account is charged.
            tokens: what the work weighs.
            work: what to do.
            lane: what goes before it.
            weight: share of this party, beside 1 for others.
            wanted: asked just before it is done, from a worker; work that is not wanted is dropped.
            joint: how to do it together with other work, if that is possible.

        Raises:
            Refusal: it was not wanted any more.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._ready:
            if self._stopping:
                raise InternalError("Work was given to a scheduler that has stopped.")
            start = max(self._now, self._served.get(party, 0.0))
            self._served[party] = start + tokens / weight
            job = _Job(start, next(self._numbers), work, done, loop, lane, wanted, joint)
            heapq.heappush(self._lanes[lane], job)
            self._ready.notify()
        del job
        try:
            return await done
        finally:
            del done  # as in `_finish`

    def _forget_some(self) -> None:
        """Forget accounts that owe nothing: whoever comes back starts at the present time anyway. If that is not
        enough, time goes on until half of them are forgotten."""
        for moment in (self._now, sorted(self._served.values())[len(self._served) // 2]):
            if len(self._served) > _ACCOUNTS:
                self._now = max(self._now, moment)
                self._served = {party: until for party, until in self._served.items() if until > self._now}

    def stop(self, timeout_s: float = 30.0) -> None:
        """Let the workers finish what they hold and end, for at most `timeout_s`; what still waits is cancelled."""
        deadline = time.monotonic() + timeout_s
        with self._ready:
            self._stopping = True
            undone = [job for lane in self._lanes.values() for job in lane]
            for lane in self._lanes.values():
                lane.clear()
            self._ready.notify_all()
        for job in undone:
            _tell(job.loop, job.done.cancel)
        for worker in self._workers:
            worker.join(max(deadline - time.monotonic(), 0.0))

    # ---- on a worker

    def _work(self) -> None:
        if self._threads_each:
            torch.set_num_threads(self._threads_each)
        while True:
            with self._ready:
                while not self.waiting and not self._stopping:
                    self._ready.wait()
                if self._stopping:
                    return
                job, ahead = self._take()
                jobs = [job, *self._companions(job)]
                if self.waiting:  # this worker may have been woken, while it stood in a window, in place of an idle one
                    self._ready.notify()
            lane = job.lane
            seconds = self._finish(jobs)
            del job, jobs  # or their tensors would stay until the next ones come
            with self._ready:
                self._book(lane, seconds, ahead=ahead)

    def _take(self) -> tuple[_Job, bool]:
        """The next job, and whether it goes ahead of a higher lane."""
        busy = [lane for lane in Lane if self._lanes[lane]]
        chosen = max(busy[1:], key=lambda lane: self._earned[lane], default=busy[0])
        ahead = chosen is not busy[0] and self._earned[chosen] > 0
        lane = chosen if ahead else busy[0]
        job = heapq.heappop(self._lanes[lane])
        self._advance(job)
        return job, ahead

    def _advance(self, job: _Job) -> None:
        self._now = max(self._now, job.virtual_start)
        if len(self._served) > _ACCOUNTS:
            self._forget_some()

    def _book(self, lane: Lane, seconds: float, *, ahead: bool) -> None:
        """Lanes below that wait have earned something; a lane that went ahead pays for it."""
        for other in Lane:
            if other > lane and self._lanes[other]:
                self._earned[other] += seconds * SHARE_OF_LOWER
            elif not self._lanes[other]:
                self._earned[other] = min(self._earned[other], 0.0)
        if ahead:
            self._earned[lane] -= seconds

    def _companions(self, job: _Job) -> list[_Job]:
        """Other jobs to do in the same pass; may wait for them a moment."""
        joint = job.joint
        if joint is None:
            return []
        until = time.monotonic() + joint.together.window_s(joint.item, len(self._like(job)))
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._ready.wait(left)
            if joint.together.window_s(joint.item, len(self._like(job))) <= 0:
                break
        found = self._like(job)
        taken = [found[index] for index in joint.together.choose(joint.item, [_item(other) for other in found])]
        numbers = {other.number for other in taken}
        lane = self._lanes[job.lane]
        lane[:] = [other for other in lane if other.number not in numbers]
        heapq.heapify(lane)
        for other in taken:
            self._advance(other)
        return taken

    def _like(self, job: _Job) -> list[_Job]:
        """What waits and could be done together with `job`, in its order."""
        assert job.joint is not None  # noqa: S101
        key = job.joint.key
        return sorted(other for other in self._lanes[job.lane] if other.joint is not None and other.joint.key == key)

    def _finish(self, jobs: list[_Job]) -> float:
        """Do them and tell who waits; the seconds that it took."""
        begun = time.monotonic()
        wanted = _wanted(jobs)
        outcomes = _outcomes(wanted)
        took = time.monotonic() - begun
        for index, (result, problem) in enumerate(outcomes):
            self._observer.work_done(begun - wanted[index].came, took / len(wanted))
            _tell(wanted[index].loop, functools.partial(_settle, wanted[index].done, result, problem))
        # A problem remembers this frame: if the frame knew the problem, its tensors would stay until a collection.
        del jobs, wanted, outcomes
        result = problem = None
        return took


def _wanted(jobs: list[_Job]) -> list[_Job]:
    """Those that somebody waits for; the others are told that they were dropped."""
    wanted = []
    for job in jobs:
        if job.wanted():
            wanted.append(job)
        else:
            _tell(job.loop, functools.partial(_settle, job.done, None, given_up()))
    return wanted


def _outcomes(jobs: list[_Job]) -> list[tuple[Any, BaseException | None]]:
    """Result or problem of each."""
    count, begun = len(jobs), time.monotonic()
    joints = [job.joint for job in jobs if job.joint is not None]
    try:
        if count > 1:
            done = joints[0].together.run([joint.item for joint in joints])
        else:
            done = [jobs[0].work()] if jobs else []
        if joints:
            joints[0].together.took([joint.item for joint in joints], time.monotonic() - begun)
        assert len(done) == count  # noqa: S101
        return [(None, one) if isinstance(one, BaseException) else (one, None) for one in done]
    except BaseException as error:  # the waiting coroutine must hear of anything that goes wrong
        del jobs, joints  # as in `_finish`
        return [(None, error)] * count


def _item(job: _Job) -> Any:
    return None if job.joint is None else job.joint.item


def _tell(loop: asyncio.AbstractEventLoop, news: Callable[[], object]) -> None:
    """Call `news` in `loop`."""
    with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
        loop.call_soon_threadsafe(news)


def _settle(done: asyncio.Future[Any], result: Any, problem: BaseException | None) -> None:
    if done.cancelled():
        return
    if problem is None:
        done.set_result(result)
    elif isinstance(problem, StopIteration) or not isinstance(problem, Exception):
        # A future does not take the one, and the others would end the loop and with it everybody's session.
        done.set_exception(InternalError(f"A worker met {type(problem).__name__}."))
    else:
        done.set_exception(problem)
