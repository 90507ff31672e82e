"""What a person sees while a benchmark runs, on standard error: a bar with the time left, or a line a case."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitfl.bench.cases import WARM_UP, Case
from splitfl.bench.table import in_words
from splitfl.metrics import Result
from splitfl.report import as_duration


class Course:
    """Goes through the cases. The time left is that of the work left, weighed by `Case.cost`, at the speed so far.

    Args:
        cases: those that will be measured.
        steps: repetitions of each, without the warm-up.
    """

    def __init__(self, cases: Sequence[Case], steps: int) -> None:
        self._repetitions = WARM_UP + steps
        self._number, self._count = 0, len(cases)
        self._total = sum(case.cost for case in cases) * self._repetitions
        self._worked, self._cost = 0.0, 0.0
        self._name = ""
        self._started = time.monotonic()
        self.console = Console(file=sys.stderr, stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeElapsedColumn(),
            console=self.console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and self._count:
            self._task = self._bar.add_task("bench", total=self._total, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, case: Case) -> None:
        """A case starts: its processes load."""
        self._number += 1
        self._name, self._cost, self._repetition = case.name, case.cost, 0
        if self._task is None:
            self._print(f"[{self._number}/{self._count}] {case.name}  {self._left()}".rstrip())
        self._update()

    def advance(self) -> None:
        """One repetition of both sides is done."""
        self._worked += self._cost
        self._update()

    def end(self, results: Sequence[Result]) -> None:
        """A case is done."""
        self._print(f"[{self._number}/{self._count}] {self._name}: {in_words(results)}")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def _left(self) -> str:
        if not self._worked:
            return ""
        spent = time.monotonic() - self._started
        return f"about {as_duration(spent * (self._total / self._worked - 1))} left"

    def _update(self) -> None:
        if self._task is not None:
            name = f"[{self._number}/{self._count}] {self._name}"
            self._bar.update(self._task, completed=self._worked, description=name, facts=self._left())

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
