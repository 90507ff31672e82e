"""Pieces of work that take turns: each has a thread of its own, and exactly one of them runs at any time.

That is what a coroutine is, for code that cannot be written as one: a model's forward pass is left in its middle, at
the remote trunk, and gone on with later. The order is set by whoever calls `Turns.resume`, never by which thread is
faster, so random numbers are drawn, and gradients added up, in the same order every time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_M_ARENA_MAX = -8  # of glibc's malloc.h


class Abandoned(BaseException):
    """This piece of work is not wanted any more: another one failed, or the run was stopped."""


class _Turn(Generic[T]):
    """One piece of work."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = work
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.abandoned = self.done = False
        self.pauses = 0
        self.result: T | None = None
        self.error: BaseException | None = None
        context = copy_context()
        context.run(_CURRENT.set, self)
        self._thread = threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Run it until it pauses or ends."""
        self._go.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self) -> None:
        """Called by the work itself: let the others run until this one is resumed."""
        self.pauses += 1
        self._back.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """Leave the work if nobody waits for it any more."""
        if self.abandoned:
            raise Abandoned

    def end(self) -> None:
        """Leave the work wherever it is, and wait for its thread."""
        self.abandoned = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.check()
            self.result = self._work()
        except BaseException as error:  # whoever resumed it must hear of it
            self.error = error
        finally:
            self.done = True
            del self._work  # and with it the tensors that it holds
            self._back.release()


_CURRENT: ContextVar[_Turn[Any] | None] = ContextVar("turn", default=None)


def meanwhile() -> None:
    """Let other work have its turn while an answer is under way; does nothing where there is none."""
    turn = _CURRENT.get()
    if turn is not None:
        turn.pause()


@contextmanager
def one_pause() -> Iterator[None]:
    """What is done in this block is followed by a pause if it has not paused by itself."""
    turn = _CURRENT.get()
    before = 0 if turn is None else turn.pauses
    yield
    if turn is not None and turn.pauses == before:
        turn.pause()


def still_wanted() -> None:
    """Leave a long wait whose result nobody wants any more.

    Raises:
        Abandoned: it is so.
    """
    turn = _CURRENT.get()
    if turn is not None:
        turn.check()


def share_heap() -> None:
    """Let threads that are started from now on take memory from one heap: what one gives back, the next one takes.

    By default glibc gives each thread a heap of its own, and four micro-batches then hold as much as if all of them
    computed at once (docs/performance.md). Does nothing where the C library has no such setting.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class Turns(Generic[T]):
    """Some pieces of work, as a context: on the way out all of them have ended.

    Args:
        works: what is to be done; each may call `meanwhile` in its middle.
    """

    def __init__(self, works: Sequence[Callable[[], T]]) -> None:
        self._turns = [_Turn(work, f"micro-batch-{number}") for number, work in enumerate(works)]

    def __enter__(self) -> Turns[T]:
        return self

    def __exit__(self, *_: object) -> None:
        for turn in self._turns:
            turn.end()

    def resume(self, number: int) -> None:
        """Go on with one piece until it pauses or ends; one that has ended is passed over.

        Raises whatever the work raises.
        """
        if not self._turns[number].done:
            self._turns[number].resume()

    def finish(self) -> list[T]:
        """Go on with all of them in turn until they have ended; their results in order."""
        while not all(turn.done for turn in self._turns):
            for number in range(len(self._turns)):
                self.resume(number)
        return [turn.result for turn in self._turns]  # type: ignore[misc]  # every one has ended without an error
