"""What a test may not leave behind: threads, child processes, ZeroMQ sockets."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import psutil
import zmq
from zmq.utils import garbage

_GRACE_S = 5.0  # for what is already on its way out when the test returns

# Daemons that libraries start once a process and never end.
_DAEMON_THREADS = ("TMonitor", "pydevd.")
_DAEMON_PROCESSES = ("multiprocessing.resource_tracker", "torch/_inductor/compile_worker")

_contexts: weakref.WeakSet[zmq.Context[Any]] = weakref.WeakSet()


def watch_contexts() -> Callable[[], None]:
    """Note every ZeroMQ context made from now on; returns what undoes it."""
    plain: Any = zmq.Context.__init__

    def noted(self: zmq.Context[Any], *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        _contexts.add(self)

    def undo() -> None:
        zmq.Context.__init__ = plain  # type: ignore[method-assign]

    zmq.Context.__init__ = noted  # type: ignore[method-assign]
    return undo


@dataclass(frozen=True, slots=True)
class Belonging:
    """One thing that exists; `held` keeps its key from being given to another thing."""

    key: Hashable
    words: str
    held: object = None


def belongings() -> dict[Hashable, Belonging]:
    """What this process has now, daemons of libraries left out."""
    threads = (Belonging(id(t), f"thread {t.name!r}", t) for t in threading.enumerate() if _counts(t))
    return {each.key: each for each in (*threads, *_children(), *_open_sockets())}


def leaks_since(before: dict[Hashable, Belonging], grace_s: float = _GRACE_S) -> list[str]:
    """What is there now and was not `before`, in words; waits up to `grace_s` for it to end."""
    left = _beyond(before)
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        gc.collect()  # a socket in a reference cycle closes when the cycle is found
        time.sleep(0.02)
        left = _beyond(before)
    return left


def _beyond(before: dict[Hashable, Belonging]) -> list[str]:
    return [each.words for key, each in belongings().items() if key not in before]


def _counts(thread: threading.Thread) -> bool:
    if isinstance(thread, threading._DummyThread | garbage.GarbageCollectorThread):
        return False
    return not (type(thread).__name__.startswith(_DAEMON_THREADS) or thread.name.startswith(_DAEMON_THREADS))


def _children() -> list[Belonging]:
    found = []
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            words = " ".join(child.cmdline())
            key, ended = (child.pid, child.create_time()), child.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue  # it has just ended
        if not ended and not any(daemon in words for daemon in _DAEMON_PROCESSES):
            found.append(Belonging(key, f"process {child.pid}: {words[:200]}"))
    return found


def _open_sockets() -> list[Belonging]:
    own = garbage.gc._context  # pyzmq's own, for sends without a copy
    return [
        Belonging(id(socket), f"socket {socket!r}", socket)
        for context in list(_contexts)
        if context is not own and not context.closed
        for socket in list(context._sockets)
        if not socket.closed
    ]
