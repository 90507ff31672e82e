"""The processes under measurement: how they start, answer and end. Every wait has a limit; none outlives the parent."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec
import psutil

from splitfl.bench.orders import Line
from splitfl.errors import ResourceError, UnreachableError, printable

A = TypeVar("A", bound=Line)

START_LIMIT_S = 300.0  # loading a model on a busy machine
ANSWER_LIMIT_S = 900.0  # one step or one generation
_END_S = 20.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Child:
    """A Python process whose standard output is read line by line; what it says on standard error goes to a file.

    It has a session of its own, so a Ctrl-C at the terminal reaches the parent alone, which then ends it in order.

    Args:
        name: for people.
        words: what follows ``python -m``.
        threads: set in its environment, for every library that reads one of the usual variables.
        log: file for its standard error.
        stop_with: signal that ends it, where the end of its input does not.
    """

    def __init__(
        self, name: str, words: Sequence[str], *, threads: int, log: Path, stop_with: signal.Signals | None = None
    ) -> None:
        self.name, self.log, self._stop_with = name, log, stop_with
        environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"reads {name}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def line(self, limit_s: float) -> bytes:
        """The next line it prints.

        Raises:
            ResourceError: it ended instead.
            UnreachableError: nothing came within `limit_s`.
        """
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise UnreachableError(
                f"The {self.name} did not answer within {limit_s:.0f} s.",
                hint="measure a smaller model or shape, or on a machine that does nothing else",
            ) from None
        if line is None:
            code = self.process.wait(_END_S)
            raise ResourceError(
                f"The {self.name} ended with code {code}: {self.last_words()}",
                hint="the memory of this machine may be too small for the model; measure a smaller one with --models",
            )
        return line

    def ask(self, order: Line, answer: type[A], limit_s: float = ANSWER_LIMIT_S) -> A:
        """Send an order and wait for its answer; errors as for `line`."""
        assert self.process.stdin is not None  # noqa: S101
        with suppress(BrokenPipeError):  # it has ended, as `line` will find
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")
            self.process.stdin.flush()
        return msgspec.json.decode(self.line(limit_s), type=answer)

    def ready(self, answer: type[A]) -> A:
        """Its first line, once it has loaded what it needs; errors as for `line`."""
        return msgspec.json.decode(self.line(START_LIMIT_S), type=answer)

    def cpu_seconds(self) -> float:
        """Processor time it has used, in all its threads."""
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(self.process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def peak_rss(self) -> int | None:
        """The most memory it has held at once, in bytes; None where the system does not tell a parent."""
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
            return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
        return None

    def end(self) -> None:
        """Close its input, and send it its signal; when that does not end it in time, kill it."""
        try:
            self._close_input()
            if self._stop_with is not None and self.process.poll() is None:
                self.process.send_signal(self._stop_with)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_S)
        finally:  # also on a second Ctrl-C
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(_END_S)
            self._reader.join(_END_S)

    def _close_input(self) -> None:
        assert self.process.stdin is not None  # noqa: S101
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None  # noqa: S101
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def last_words(self) -> str:
        """Why it ended, as its standard error says: its error, else its last line; safe to print."""
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        return printable((errors or said or ["it said nothing"])[-1], 300)


class Owner(Child):
    """A real ``splitfl serve``; ends on SIGTERM as a served owner does."""

    def __init__(self, options: Sequence[str], *, threads: int, log: Path) -> None:
        words = ["splitfl", "serve", *options, "--threads", str(threads)]
        super().__init__("owner", words, threads=threads, log=log, stop_with=signal.SIGTERM)

    def address(self) -> str:
        """Where it listens, once it is ready; errors as for `Child.line`."""
        word, address, _ = self.line(START_LIMIT_S).decode().split()
        assert word == "ready"  # noqa: S101  it prints nothing else
        return address


def run_to_end(words: Sequence[str], *, log: Path, limit_s: float = START_LIMIT_S) -> None:
    """Run ``python -m WORDS`` and wait for it.

    Raises:
        ResourceError: it failed, or took longer than `limit_s`.
    """
    name = " ".join(words[:2])
    with Child(name, words, threads=psutil.cpu_count() or 1, log=log, stop_with=signal.SIGTERM) as child:
        try:
            code = child.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise ResourceError(f"{name} was not done within {limit_s:.0f} s.") from None
        if code:
            raise ResourceError(f"{name} ended with code {code}: {child.last_words()}")
