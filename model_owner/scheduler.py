"""Step 9 of the journey: a fair queue in tokens, and the workers that own the device.

The thread that owns the sockets never computes; workers never touch a socket. Work waits in one queue, ordered by the
tokens that its session has been served so far, so a party with large batches cannot starve one with small ones.
Several one-thread workers serve several parties better than one worker with several threads (docs/performance.md).
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
from typing import Any, TypeVar

import torch

from model_owner.observer import NoObserver, Observer
from splitfl.errors import InternalError

T = TypeVar("T")


@dataclass(order=True)
class _Job:
    virtual_start: float
    number: int
    work: Callable[[], Any] = field(compare=False)
    done: asyncio.Future[Any] = field(compare=False)
    loop: asyncio.AbstractEventLoop = field(compare=False)
    came: float = field(default_factory=time.monotonic, compare=False)


class Scheduler:
    """Start-time fair queueing in front of a fixed number of worker threads.

    Args:
        workers: threads that compute at the same time.
        threads: torch's threads within each worker; None leaves torch's choice.
        observer: is told of each piece of work.
    """

    def __init__(self, workers: int = 1, threads: int | None = None, observer: Observer | None = None) -> None:
        self._observer: Observer = observer or NoObserver()
        self._threads_each = threads
        self._queue: list[_Job] = []
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
        return len(self._queue)

    async def run(self, session: Hashable, tokens: int, work: Callable[[], T]) -> T:
        """Do `work` on a worker, in this session's turn; `tokens` is what it weighs."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._ready:
            if self._stopping:
                raise InternalError("Work was given to a scheduler that has stopped.")
            start = max(self._now, self._served.get(session, 0.0))
            self._served[session] = start + tokens
            heapq.heappush(self._queue, _Job(start, next(self._numbers), work, done, loop))
            self._ready.notify()
        try:
            return await done
        finally:
            del done  # as in `_finish`

    def forget(self, session: Hashable) -> None:
        """Drop a closed session's account."""
        with self._ready:
            self._served.pop(session, None)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Let the workers finish what they hold and end, for at most `timeout_s`; what still waits is cancelled."""
        deadline = time.monotonic() + timeout_s
        with self._ready:
            self._stopping = True
            undone, self._queue = self._queue, []
            self._ready.notify_all()
        for job in undone:
            _tell(job.loop, job.done.cancel)
        for worker in self._workers:
            worker.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        if self._threads_each:
            torch.set_num_threads(self._threads_each)
        while True:
            with self._ready:
                while not self._queue and not self._stopping:
                    self._ready.wait()
                if self._stopping:
                    return
                job = heapq.heappop(self._queue)
                self._now = max(self._now, job.virtual_start)
            self._finish(job)
            del job  # or its tensors would stay until the next one comes

    def _finish(self, job: _Job) -> None:
        result: Any = None
        problem: BaseException | None = None
        begun = time.monotonic()
        try:
            result = job.work()
        except BaseException as error:  # the waiting coroutine must hear of anything that goes wrong
            problem = error
        self._observer.work_done(begun - job.came, time.monotonic() - begun)
        news = functools.partial(_settle, job.done, result, problem)
        _tell(job.loop, news)
        # A problem remembers this frame: if the frame knew the problem, its tensors would stay until a collection.
        del job, result, problem, news


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
