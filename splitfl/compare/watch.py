"""What a process takes while it runs: when it is gone it cannot be asked any more."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from splitfl.bench.children import Child
from splitfl.errors import ResourceError

_EVERY_S = 0.05


class Watch:
    """Samples processor time and memory of a child.

    Args:
        child: which.
        log: its `run.jsonl`; processor time before the ``start`` event, which goes into loading, is left out. None
            counts from now on.
    """

    def __init__(self, child: Child, log: Path | None = None) -> None:
        self._child, self._log = child, log
        self._before: float | None = child.cpu_seconds() if log is None else None
        self._last, self.peak = 0.0, child.peak_rss() or 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watches {child.name}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Processor seconds so far, in all threads."""
        return max(0.0, self._last - (self._before or 0.0))

    def sample(self) -> None:
        """Look now."""
        self.peak = max(self.peak, self._child.peak_rss() or 0)
        self._last = max(self._last, self._child.cpu_seconds())
        if self._before is None and self._log is not None and _has_started(self._log):
            self._before = self._last

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            self.sample()


def _has_started(log: Path) -> bool:
    try:
        with log.open("rb") as file:
            return b'"event": "start"' in file.readline()
    except OSError:
        return False


def wait_for(children: Sequence[Child], limit_s: float) -> None:
    """Until all have ended by themselves.

    Raises:
        ResourceError: one failed, or they took longer than `limit_s` seconds.
    """
    left = limit_s
    while running := [child for child in children if child.process.poll() is None]:
        if failed := next((c for c in children if c.process.poll() not in (None, 0)), None):
            raise _failure(failed)
        try:
            running[0].process.wait(1.0)
        except subprocess.TimeoutExpired:
            left -= 1.0
            if left <= 0:
                raise ResourceError(f"The {running[0].name} was not done within {limit_s:.0f} s.") from None
    for child in children:
        if child.process.returncode:
            raise _failure(child)


def _failure(child: Child) -> ResourceError:
    return ResourceError(f"{child.name} ended with code {child.process.poll()}: {child.last_words()}")
