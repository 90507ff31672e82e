"""A child process whose output is collected line by line, and which is always ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from splitfl.cli import app
from splitfl.options import run_app

PATIENCE_S = 120.0
"""Longest wait for anything: far above what it takes, for machines with much else to do."""

_REPOSITORY = Path(__file__).resolve().parents[2]


class Transcript:
    """The lines of one stream of a process, as they come."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(stream,), name="transcript")
        self._reader.start()

    @property
    def text(self) -> str:
        """All that has come so far."""
        with self._news:
            return "\n".join(self._lines)

    def wait_for(self, words: str, *, count: int = 1, timeout_s: float = PATIENCE_S) -> str:
        """Line number `count` of those that hold `words`; fails when the stream ends, or time passes, without it."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                found = [line for line in self._lines if words in line]
                if len(found) >= count:
                    return found[count - 1]
                if self._ended or not self._news.wait(max(deadline - time.monotonic(), 0)):
                    came = "\n".join(self._lines)
                    raise AssertionError(f"no line with {words!r} came; what came:\n{came}")

    def join(self) -> None:
        """Wait until the stream has ended."""
        self._reader.join(PATIENCE_S)

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    self._lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class Child:
    """A running process with its two transcripts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.stdout, self.stderr = Transcript(process.stdout), Transcript(process.stderr)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait until it ends by itself; its exit code."""
        code = self.process.wait(timeout_s)
        self.stdout.join()
        self.stderr.join()
        return code

    def end(self, grace_s: float = 15.0) -> int:
        """End it: SIGTERM, and SIGKILL if that does not help. Its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.wait()


@contextmanager
def child(words: Sequence[str | Path], folder: Path) -> Iterator[Child]:
    """Start ``python WORDS`` in `folder`; on the way out it is ended if it still runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    running = Child(process)
    try:
        yield running
    finally:
        running.end()


def splitfl(*words: str | Path, folder: Path, code: int = 0) -> Child:
    """Run ``splitfl WORDS`` to its end in a process of its own; it must end with this exit code."""
    with child(["-m", "splitfl", *words], folder) as running:
        came = running.wait()
    assert came == code, f"exit code {came}, not {code}:\n{running.stderr.text}\n{running.stdout.text}"
    return running


def splitfl_here(*words: str | Path, code: int = 0) -> None:
    """The same in this process, without the seconds that a new one takes to load everything."""
    with pytest.raises(SystemExit) as stop:
        run_app(app, [str(word) for word in words])
    assert stop.value.code == code
