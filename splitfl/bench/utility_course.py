"""What a person sees of `splitfl bench utility` and `offsite`: a bar with the time left, and a line a run."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitfl.bench.utility_cases import Cell
from splitfl.bench.utility_orders import Trained
from splitfl.report import as_duration


class UtilityCourse:
    """Counts runs; the time left is that of the runs so far, times those that are left.

    Args:
        count: runs that will be done.
        title: stands before the bar.
    """

    def __init__(self, count: int, title: str = "bench utility") -> None:
        self._count, self._done, self._title = count, 0, title
        self._started: float | None = None
        self.console = Console(file=sys.stderr, stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[facts]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and self._count:
            self._task = self._bar.add_task(self._title, total=self._count, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """The first run starts: preparing is not counted."""
        self._started = time.monotonic()

    def end(self, cell: Cell, trained: Trained) -> None:
        """A run is done, or was refused."""
        self.done(cell.name, in_words(cell, trained))

    def done(self, name: str, words: str) -> None:
        """The run of that name came out as the words say."""
        self._done += 1
        left = f"  {self._left()}" if self._done < self._count else ""
        self.say(f"[{self._done}/{self._count}] {name}: {words}{left}")
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, facts=self._left())

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away; where none was shown, stopping it would print an empty line."""
        if self._task is not None:
            self._bar.stop()

    def _left(self) -> str:
        if self._started is None or not self._done:
            return ""
        spent = time.monotonic() - self._started
        return f"about {as_duration(spent / self._done * (self._count - self._done))} left"


def in_words(cell: Cell, trained: Trained) -> str:
    """The main figure of a run, in one line."""
    if trained.failed:
        return f"failed: {trained.failed}"
    metric, figures = cell.task.metric, trained.figures
    name = metric.removeprefix("held-out ").replace("macro_f1", "macro F1")
    seconds = as_duration(figures["seconds"])
    return f"{name} {figures[f'{metric} before']:.3f} -> {figures[metric]:.3f} in {seconds}"
