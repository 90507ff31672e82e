"""What a person sees while an audit runs, on standard error: a bar with the time left, or a line an attack."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitfl.report import as_duration


class Course:
    """Goes through the attacks. The time left is that of the attacks so far, times those that are left.

    Args:
        count: attacks that will be run.
    """

    def __init__(self, count: int) -> None:
        self._count, self._done, self._skipped = count, 0, 0
        self._started = time.monotonic()
        self._name = ""
        self.console = Console(file=sys.stderr, stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[facts]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and self._count:
            self._task = self._bar.add_task("audit", total=self._count, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def begin(self, name: str) -> None:
        """An attack starts."""
        self._name = name
        self.advance(0.0)

    def advance(self, share: float) -> None:
        """So much of the attack is done, 0 to 1."""
        if self._task is not None:
            done = self._done + min(max(share, 0.0), 1.0)
            facts = f"{share:.0%}  {self._left(done)}"
            self._bar.update(self._task, completed=done, description=self._name, facts=facts)

    def end(self, words: str, *, kept: bool = False) -> None:
        """The attack came out as the words say; `kept` where it was done by an earlier command."""
        self._done += 1
        if kept:
            self._skipped += 1
        left = "" if self._done == self._count else f"  {self._left(self._done)}"
        self.say(f"[{self._done}/{self._count}] {self._name}: {words}{left}".rstrip())
        self.advance(0.0)

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, done: float) -> str:
        worked = done - self._skipped
        if worked <= 0:
            return ""
        spent = time.monotonic() - self._started
        return f"about {as_duration(spent / worked * (self._count - done))} left"
